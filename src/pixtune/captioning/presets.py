"""Questions to a captioner, by what is to be learnt.

A LoRA learns what its captions leave out: whatever a caption names can be changed by a prompt later, and the rest
sticks to the trigger word. So a style's captions say nothing of style, and a person's nothing of the face.
"""

from __future__ import annotations

PLAIN, EDIT = "plain", "edit"
PRESETS = {
    PLAIN: (
        "Describe this picture for training a model that makes pictures from text: its subjects with their number, "
        "looks and doings, where they are, what surrounds them, colours, light, point of view and medium."
    ),
    "style": (
        "Describe what this picture shows, for training a model on its artistic style: the subjects with their number, "
        "clothing and doings, where they are, what surrounds them, colours of things and point of view. Say nothing of "
        "style, medium, technique, line, shading, mood or quality."
    ),
    "person": (
        "Describe this picture of a person, for training a model on that person: clothing and accessories, pose, "
        "expression, where the person looks and is, what surrounds them, light and point of view. Say nothing of face, "
        "hair, skin, body, age or identity, and give no name: write of \"a person\"."
    ),
    "object": (
        "Describe this picture of an object, for training a model on that object: where it is and how it lies or is "
        "used, what surrounds it, light, background and point of view. Say nothing of the object's own shape, colours, "
        "material or make: write of \"the object\"."
    ),
    EDIT: (
        "The last picture was made by editing the one before it. Write the instruction that an editor was given: what "
        "to change, add, remove or replace, where, and how it is to look. Begin with a verb. Do not mention what stays "
        "as it is, and do not speak of pictures by number."
    ),
}  # fmt: skip
"""Questions by name, without the limit of length."""


def question_of(preset: str, max_words: int) -> str:
    """Returns the whole question of a preset."""
    return (
        f"{PRESETS[preset]} Answer in plain English, in one paragraph of at most {max_words} words, without a heading, "
        "a list or an introduction."
    )
