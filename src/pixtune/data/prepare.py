"""Prepares a data set: from a folder of pictures to the examples, held-out pictures and prompts that the loop reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from pixtune.config.folders import Folder, folder_beside, folders_of, prior_folder
from pixtune.config.schema import TrainConfig
from pixtune.data.build_encoder import build_encoder, check_cache
from pixtune.data.encode import Encoder
from pixtune.data.encodings import Encodings, control_pictures, target_picture, text_item
from pixtune.data.example_table import Example, Examples, signatures_of
from pixtune.data.examples import (
    check_folder,
    check_purposes,
    folders_apart,
    read_examples,
    shared_pictures,
    take_digests,
    used_examples,
    without_held_out,
)
from pixtune.data.filling import missing_keys
from pixtune.data.held_out import hold_out
from pixtune.data.mask_weights import Masks
from pixtune.data.pairs import shorten as shorten_names
from pixtune.data.prepared import (
    DataFingerprint,
    PreparedData,
    captioned_sizes,
    dropped_captions,
    encoded_reader,
    most_image_tokens,
    with_weights,
)
from pixtune.data.prompts import control_rules, encode_prompt, nothing_to_edit, prompt_example, rounded_sizes
from pixtune.data.random_data import random_data
from pixtune.data.rivals import choose_trials, not_judged
from pixtune.data.sample_prompts import AskedPrompt, asked_prompts, default_size
from pixtune.data.swapped import choose_pairs, read_pairs
from pixtune.data.wanted import Wanted, all_variants
from pixtune.family import ModelFamily
from pixtune.hardware.monitor import StageLog
from pixtune.judging.validation import HeldOutPicture
from pixtune.launch.crew import ALONE, Crew
from pixtune.plan.encoders import EncoderPlan
from pixtune.plan.passes import needs_negative
from pixtune.plan.text_padding import Captions
from pixtune.progress import announced, say
from pixtune.sampler import EncodedPrompt
from pixtune.storage.files import check_outputs, text_digest
from pixtune.storage.loading import check_parts
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.resume import MOST_NAMED_EXAMPLES

MOST_COUNTED = 200_000
"""Number of examples from which captions' tokens are not counted before training: one core counts 2,000 a second."""


def prepare_data(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    accelerator: Accelerator,
    stages: StageLog | None = None,
    encoders: EncoderPlan | None = None,
    check: Callable[[DataFingerprint], object] = lambda fingerprint: None,
    prior: Path | None = None,
    crew: Crew = ALONE,
) -> PreparedData:
    """Reads the data set, encodes what the cache lacks, and reports both.

    The processes that see one cache divide the encoding; with the cache in memory each encodes for itself.

    Args:
        stages: log that gets the memory of both encodings.
        encoders: the encoders' plan of a run that is resumed; None: made for this machine as it is.
        check: receives the data's fingerprint before anything is encoded, and may refuse it by raising.
        prior: folder of regularization pictures; None: there are none.
        crew: all processes of the run.

    Raises:
        ConfigError: one folder is given for two purposes.
        DataError: pictures or captions that cannot be used, all together.
        WeightsError: files of the model are damaged.
        PlanError: the config demands an encoder on the GPU where it does not fit.
        WriteError: results cannot be written, or something is to be encoded and the cache cannot.
        TrainingError: another process failed at its share.
    """
    check_purposes(config)
    if accelerator.is_main_process:
        check_outputs(config)
    if not config.random_weights:
        check_parts(folder, (*family.text_components, "vae", "transformer"))
    multiple, data = family.pixel_multiple(folder), config.data_config
    rules = control_rules(family, folder, data.control_size)
    apart, notes = folders_apart(config), list[str]()
    folders, examples, own, held_out = read_own(config, family, folder, notes.append, crew)
    of_prior: Sequence[Example] = ()
    if prior is not None:
        folders.append(prior_folder(data, config.prior_preservation, prior))
        read = read_examples(folders[-1:], multiple, rules, apart, notes.append, config.seed, crew)
        of_prior, examples = read.where(lambda each: each.is_used), Examples((*examples, *read))
    if config.random_weights:
        drawn = random_data(config, family, folder, [*own, *of_prior], held_out)
        return replace(drawn, num_prior=len(of_prior))

    if len(data.folders) > 1 or prior is not None:
        notes += filter(None, [shared_pictures(examples)])
    wanted, more = choose_wanted(config, family, folder, own, of_prior, held_out)
    notes += more
    items, pictures = wanted.texts(config, family), wanted.pictures(config)
    encoder = build_encoder(config, family, folder, accelerator, items, pictures, encoders, crew)
    encodings = Encodings(encoder)
    masks = Masks(family, folder, encoder.store, encoder.ledger, encoder.crew)
    with announced("recognizing the encoders by their files", partial(say, encoder.console)):
        fingerprint = _fingerprint(encoder, masks, wanted.training)
    check(fingerprint)
    masked = [*all_variants(each for each in (*wanted.training, *held_out) if each.mask)]
    no_texts, no_latents = encodings.know(items, pictures)
    if no_texts or no_latents or missing_keys(encoder.store, masks.keys(masked), encoder.crew):
        check_cache(config)
    notes += masks.fill(masked)
    if no_latents:
        for checked in folders:
            with announced(f"checking the pictures in {checked.img_dir}", partial(say, encoder.console)):
                notes += check_folder(checked, multiple, apart, encoder.crew)
    if accelerator.is_main_process:
        notes += _cut_captions(encoder, wanted)
    for sentence in notes:
        say(encoder.console, f"note: {sentence}")
    for reason in encoder.plan.reasons:
        say(encoder.console, f"encoders: {reason}")
    stages = stages or StageLog()
    say(encoder.console, f"captions: {encodings.fill_texts(items, no_texts)}")
    stages.record("text encoding")
    say(encoder.console, f"pictures: {encodings.fill_pictures(pictures, no_latents)}")
    stages.record("image encoding")
    del items, pictures  # a million take a third of a gigabyte
    crew.wait("preparing the data set")
    if not config.precompute_text_embeddings:
        encodings.keep_text_encoder()
    if not config.precompute_image_embeddings:
        encodings.keep_autoencoder()
    return _gather(config, family, folder, encodings, masks, wanted, fingerprint)


def choose_wanted(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    own: Sequence[Example],
    of_prior: Sequence[Example],
    held_out: Sequence[Example],
) -> tuple[Wanted, list[str]]:
    """Chooses what is read beside the examples, and writes sentences for the user on what it meets."""
    rules = control_rules(family, folder, config.data_config.control_size)
    notes = missing_triggers(own, config.trigger_words) + partly_masked(own)
    asked, prompts, of_prompts = prompts_of(config, family, folder)
    notes += of_prompts
    training = Examples((*own, *of_prior)) if of_prior else own
    pairs = choose_pairs(training, rules, family.dropped_caption, config.seed)
    trials = choose_trials(own, config, family.controls_in_text)
    notes += not_judged(trials, config)
    return Wanted(training, len(of_prior), held_out, asked, prompts, pairs, trials), notes


def prompts_of(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder
) -> tuple[list[AskedPrompt], list[Example], list[str]]:
    """Returns the prompts of samples, the same in the form of examples, and sentences for the user on them."""
    multiple = family.pixel_multiple(folder)
    rules = control_rules(family, folder, config.data_config.control_size)
    asked = asked_prompts(config)
    prompts = [
        prompt_example(p.text, p.controls, p.size or default_size(config), p.size is None, multiple, rules)
        for p in asked
    ]
    drawn = [p.size or default_size(config) for p in asked if p.size or not p.controls]
    notes = [note for size in dict.fromkeys(drawn) for note in rounded_sizes(size, multiple)]
    notes += nothing_to_edit(family, asked, "Name a list for each prompt: samples.controls")
    asks_for_negatives = any(p.negative is not None for p in asked)
    if asks_for_negatives and not needs_negative(family, config.samples.guidance_scale):
        notes.append("negative prompts have no effect: this model, or a guidance_scale of 1, takes no pass for them.")
    return asked, prompts, notes


def read_own(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    note: Callable[[str], None] = lambda sentence: None,
    crew: Crew | None = None,
) -> tuple[list[Folder], Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Reads a data set's examples, without regularization pictures, from headers alone.

    Args:
        note: called with each sentence for the user.
        crew: processes that divide the reading, and take the digests of all pictures, too; None: this one reads alone,
            and only headers as far as that will do.

    Returns:
        The folders, all examples that are used, those to train on, and those held out.

    Raises:
        DataError: pictures or captions that cannot be used, all together.
    """
    multiple, data = family.pixel_multiple(folder), config.data_config
    rules, apart = control_rules(family, folder, data.control_size), folders_apart(config)
    folders = list(folders_of(data))
    for img_size in dict.fromkeys(size for each in folders for size in each.img_sizes if size % multiple):
        side = img_size // multiple * multiple
        note(f"img_size {img_size} is no multiple of {multiple}: square pictures train at {side}x{side}.")
    read = read_examples(folders, multiple, rules, apart, note, config.seed, crew or ALONE)
    if crew is not None and not config.random_weights:
        take_digests(read, crew)
    examples = used_examples(read)
    training, held_out = hold_out(examples, config, note)
    if config.validation.held_out_dir is not None:
        folders.append(folder_beside(data, config.validation.held_out_dir))
        held_out = read_examples(folders[-1:], multiple, rules, apart, note, config.seed, crew or ALONE)
        training, sentence = without_held_out(training, held_out)
        if sentence:
            note(sentence)
    return folders, examples, training, held_out


def _fingerprint(encoder: Encoder, masks: Masks, training: Sequence[Example]) -> DataFingerprint:
    """Returns a hash over everything that decides what is trained on, from the keys of its encodings."""
    hashed = hashlib.sha256()
    text_key, latent_key = encoder.text_key_builder(), encoder.latent_key_builder()

    def digests() -> Iterator[str]:
        for example, variant in all_variants(training):
            for text in example.captions:
                yield text_key(text_item(text, example, variant)).digest
        for example, variant in all_variants(training):
            for picture in (target_picture(example, variant), *control_pictures(example, variant)):
                yield latent_key(picture).content
        if any(example.mask for example in training):
            for number, row in enumerate(all_variants(training)):  # numbered, since not each has a mask
                for key in masks.keys([row]):
                    yield f"{number} {key.digest}"

    for place, digest in enumerate(digests()):
        hashed.update(f"\n{digest}".encode() if place else digest.encode())
    return DataFingerprint(hashed.hexdigest(), _digests_by_name(training))


def _cut_captions(encoder: Encoder, wanted: Wanted) -> list[str]:
    """Names the captions that the text encoders cut, in sentences, unless there are too many to count their tokens."""
    if len(wanted.training) <= MOST_COUNTED:
        return encoder.cut_captions([*wanted.named_texts()])
    return [
        f"more than {MOST_COUNTED:,} captions are not measured before training: pixtune validate names those that the "
        "text encoder cuts."
    ]


def missing_triggers(training: Sequence[Example], words: Sequence[str]) -> list[str]:
    """Writes a sentence for each trigger word that captions lack: nothing else puts it there."""
    sentences = []
    for word in words:
        lacking = [
            each.name for each in training if any(word.casefold() not in text.casefold() for text in each.captions)
        ]
        if lacking:
            sentences.append(
                f"{len(lacking)} of {len(training)} captions lack the trigger word {word!r}: {shorten_names(lacking)}. "
                "The LoRA learns it from captions alone, so write it there, or set data_config.caption_prefix."
            )
    return sentences


def partly_masked(training: Sequence[Example]) -> list[str]:
    """Writes a sentence where some pictures have masks and others count as a whole, which nothing else shows."""
    num_masked = sum(each.mask is not None for each in training)
    if num_masked in (0, len(training)):
        return []
    return [f"{num_masked} of {len(training)} pictures have masks; the others count as a whole."]


def _digests_by_name(training: Sequence[Example]) -> dict[str, str] | None:
    """Returns a short digest of each example's caption and pictures; None where there are too many to record."""
    if len(training) > MOST_NAMED_EXAMPLES:
        return None
    return {
        each.name: "-".join(text_digest(text)[:8] for text in ("\0".join(each.captions), "\n".join(each.digests)))
        for each in training
    }


def _gather(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    encodings: Encodings,
    masks: Masks,
    wanted: Wanted,
    fingerprint: DataFingerprint,
) -> PreparedData:
    training = wanted.training

    def read_weights(example: int, variant: int) -> Tensor:
        return masks.weights(training[example], variant)

    reader = encoded_reader(family, folder, training, [example.name for example in training], encodings)
    known, variants = config.precompute_text_embeddings, all_variants(training)
    longest = variants if known else [max(variants, key=lambda row: max(map(len, row[0].captions)))]
    dropout = config.data_config.caption_dropout_rate
    dropped = dropped_captions(family, training, dropout)
    captions = list(
        dict.fromkeys(
            text_item(text, example, variant)
            for example, variant in longest
            for text in (*(example.captions if known else [max(example.captions, key=len)]), *dropped)
        )
    )
    # Each that is in the cache is a file to open.
    counting = encodings.encoder.crew if known else ALONE
    lengths = counting.map("measuring captions", captions, lambda part: [*map(encodings.count_text_tokens, part)])
    text_tokens = dict(zip(captions, lengths, strict=True))
    return PreparedData(
        reader=with_weights(reader, training, read_weights),
        buckets=signatures_of(training),
        held_out=[held_out_picture(example, encodings, masks) for example in wanted.held_out],
        prompts=encoded_prompts(config, family, encodings, wanted),
        both_ways=read_pairs(wanted.pairs, encodings, family.dropped_caption),
        most_image_tokens=most_image_tokens(family, folder, training),
        most_text_tokens=max(text_tokens.values()),
        captions=Captions(
            differ=len(set(text_tokens.values())) > 1 or not known,
            sizes=captioned_sizes(family, folder, training, text_tokens, dropout) if known else (),
        ),
        fingerprint=fingerprint,
        encoders=encodings.encoder.plan,
        uses=[example.use for example in training],
        num_prior=wanted.num_prior,
        trials=wanted.trials.read_by(encodings),
    )


def held_out_picture(example: Example, encodings: Encodings, masks: Masks | None) -> HeldOutPicture:
    """Reads an example, in its first framing and with its first caption, as a picture to measure.

    Args:
        masks: weights of masked examples; None: there are none.
    """
    return HeldOutPicture(
        example.name,
        encodings.latents(target_picture(example, 0)).mean_BCHW,
        encodings.text(text_item(example.caption, example, 0)),
        tuple(encodings.latents(picture).mean_BCHW for picture in control_pictures(example, 0)),
        masks.weights(example, 0) if masks and example.mask else None,
    )


def encoded_prompts(
    config: TrainConfig, family: ModelFamily, encodings: Encodings, wanted: Wanted
) -> list[EncodedPrompt]:
    """Reads the prompts of samples as the sampler takes them."""
    return [
        encode_prompt(family, encodings, each, prompt, config.samples.guidance_scale)
        for each, prompt in zip(wanted.asked, wanted.prompts, strict=True)
    ]
