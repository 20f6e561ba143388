"""Prepares a streamed data set: opens it, reads and encodes its first window, and hands on the order that goes on so.

A window is encoded between two steps, with the encoders beside the idle transformer: that needs no activations then,
and captured steps give their memory back. The encoders' format is planned for the room that is left there, and is the
same for all windows, since others would be other data. They leave the device before the next step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from accelerate import Accelerator
from torch import Tensor

from pixtune.config.folders import Folder, cache_folder, folder_beside, folders_of
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import AUTO_FROM, AUTO_MOST
from pixtune.data.buckets import Framing, build_buckets
from pixtune.data.build_encoder import build_encoder, check_cache
from pixtune.data.cache import DiskStore, Ledger
from pixtune.data.controls import ControlRules
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.encodings import Encodings
from pixtune.data.examples import check_purposes, folders_apart, read_examples
from pixtune.data.order import Use
from pixtune.data.prepare import encoded_prompts, held_out_picture, missing_triggers, prompts_of
from pixtune.data.prepared import DataFingerprint, PreparedData, encoded_reader, image_tokens
from pixtune.data.prompts import control_rules
from pixtune.data.rivals import NO_TRIALS
from pixtune.data.streamed.beside import BesideTransformer, encoding_room, plan_encoders_beside, sizes_of
from pixtune.data.streamed.bounded_store import BoundedStore
from pixtune.data.streamed.framing import Framer
from pixtune.data.streamed.order import StreamOrder
from pixtune.data.streamed.position import first_position
from pixtune.data.streamed.reading import Patience, Reader
from pixtune.data.streamed.shards import Shards, open_shards
from pixtune.data.streamed.state import StreamState, from_tensor
from pixtune.data.streamed.supply import Supply
from pixtune.data.wanted import Wanted
from pixtune.errors import CheckpointError, DataError
from pixtune.family import ModelFamily
from pixtune.hardware.facts import GIB
from pixtune.hardware.monitor import StageLog
from pixtune.launch.crew import ALONE, Crew
from pixtune.launch.stop import StopRequest
from pixtune.plan.encoders import TEXT_TOKENS, EncoderPlan
from pixtune.plan.text_padding import Captions
from pixtune.progress import announced, say
from pixtune.storage.files import check_outputs, text_digest
from pixtune.storage.loading import check_parts
from pixtune.storage.model_folder import ModelFolder

FOLDER = "stream"
"""Folder of a stream's encodings and of its window's pictures, inside the cache's."""


def prepare_stream(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    accelerator: Accelerator,
    stages: StageLog | None = None,
    encoders: EncoderPlan | None = None,
    check: Callable[[DataFingerprint], object] = lambda fingerprint: None,
    crew: Crew = ALONE,
    stored: Tensor | None = None,
    stop: StopRequest | None = None,
) -> PreparedData:
    """Opens a stream, encodes its first window, or what a checkpoint holds of its windows, and reports both.

    Args:
        stages, encoders, check, crew: as for `prepare_data`.
        stored: state of the stream in the checkpoint that is resumed; None: the stream begins.
        stop: the request to end early, which reading notices; None: it never comes.

    Raises:
        ConfigError: one folder is given for two purposes.
        DataError: the stream cannot be read, or too many of its rows cannot be used.
        CheckpointError: the stored state is of another stream.
        WeightsError, PlanError, WriteError, TrainingError: as `prepare_data`.
    """
    check_purposes(config)
    if accelerator.is_main_process:
        check_outputs(config)
    check_parts(folder, (*family.text_components, "vae", "transformer"))
    check_cache(config)
    (own,), apart = folders_of(config.data_config), folders_apart(config)
    multiple, rules = family.pixel_multiple(folder), control_rules(family, folder, config.data_config.control_size)
    shards = open_shards(own, apart)
    if not shards.names:
        raise DataError("nothing is left to train on", [f"{own.img_dir} holds no pictures."])
    largest = largest_of(config, family, folder, _num_controls(own, rules))
    sizes = sizes_of(config, family, folder, largest)
    encoders = encoders or plan_encoders_beside(config, family, folder, accelerator, largest, sizes)
    check_request = stop.check if stop is not None else lambda: None
    encoder = build_encoder(config, family, folder, accelerator, (), (), encoders, crew)
    place = cache_folder(config.data_config) / FOLDER
    store = BoundedStore(
        DiskStore(place / "entries"),
        round(config.stream.cache_limit_gib * GIB),
        encoder.crew,
        check_request if encoder.crew.size == 1 else lambda: None,  # others would wait for one that ends alone
    )
    encodings = Encodings(replace(encoder, store=store, ledger=Ledger(None), counts_file=None))
    show = partial(say, encoder.console)
    with announced("recognizing the encoders by their files", show):
        fingerprint = DataFingerprint(_digest(config, shards, encodings.encoder))
    check(fingerprint)

    pictures = place / f"pictures-{text_digest(str(config.output_dir.resolve()))[:16]}"
    reader = Reader(
        shards, own.captions, (rules.most if rules else 0, own.allow_missing_controls), pictures, config.seed,
        Patience(config.stream.patience_seconds, check_request), encoder.crew,
    )  # fmt: skip
    framer = Framer(
        own, multiple, rules, config.seed, shards.names, lambda digest: reader.paths.get(digest, pictures / digest)
    )
    with announced("reading the stream", show):
        state = _begun(config, reader) if stored is None else _restored(stored, shards, config)
    held_out = [framer.held_out(row) for row in state.held_out]
    notes: list[str] = []
    if config.validation.held_out_dir is not None:
        beside = [folder_beside(config.data_config, config.validation.held_out_dir)]
        held_out = list(read_examples(beside, multiple, rules, apart, notes.append, config.seed, crew))
    reader.held_out = {example.image_digest for example in held_out}
    reader.held_out_rows = state.held_out_rows
    asked, prompts, of_prompts = prompts_of(config, family, folder)
    wanted = Wanted((), 0, held_out, asked, prompts, (), NO_TRIALS)
    supply = Supply(config, family, reader, framer, encodings, store, crew, wanted, state.held_out, show)
    order = StreamOrder(
        config.seed, config.batch_size * accelerator.num_processes, supply, state,
        Use(caption_dropout_rate=own.caption_dropout_rate),
    )  # fmt: skip
    for sentence in (*notes, *of_prompts):
        show(f"note: {sentence}")
    for reason in encoder.plan.reasons:
        show(f"encoders: {reason}")
    if stored is not None:
        order.encode_again()
    at_end = state.end >= (config.max_train_steps or 0) * config.gradient_accumulation_steps
    if stored is None or (not order.examples and not at_end):  # new, or of a checkpoint at the end of a window
        order.extend()
    for sentence in missing_triggers([*order.examples.values()], config.trigger_words):
        show(f"note: of the first window, {sentence}")
    (stages or StageLog()).record("encoding")
    crew.wait("preparing the data set")
    return _reported(supply, folder, order, largest, fingerprint, encoding_room(sizes, encoder.plan))


def _reported(
    supply: Supply,
    folder: ModelFolder,
    order: StreamOrder,
    largest: BesideTransformer,
    fingerprint: DataFingerprint,
    encoding_bytes: int,
) -> PreparedData:
    """Returns what a run has to know of a stream, as far as its first window tells."""
    config, family, encodings, wanted = supply.config, supply.family, supply.encodings, supply.beside
    first_window = [*order.examples.values()]
    texts = replace(wanted, training=first_window).texts(config, family)
    return PreparedData(
        reader=encoded_reader(family, folder, order.examples, order.names, encodings),
        buckets=[[example.signature(0)] for example in first_window],
        held_out=[held_out_picture(example, encodings, None) for example in wanted.held_out],
        prompts=encoded_prompts(config, family, encodings, wanted),
        both_ways=[],
        most_image_tokens=max(
            [largest.image_tokens, *(image_tokens(family, folder, each.signature(0)) for each in first_window)]
        ),
        most_text_tokens=max([largest.text_tokens, *map(encodings.count_text_tokens, texts)]),
        captions=Captions(differ=True),
        fingerprint=fingerprint,
        encoders=encodings.encoder.plan,
        uses=order.uses,
        stream=order,
        encoding_bytes=encoding_bytes,
    )


def largest_of(config: TrainConfig, family: ModelFamily, folder: ModelFolder, num_controls: int) -> BesideTransformer:
    """Returns the largest items that a stream can have, before any of its rows is read.

    Args:
        num_controls: control pictures of an example.
    """
    data, multiple = config.data_config, family.pixel_multiple(folder)
    (own,) = folders_of(data)
    sizes = {size for img_size in own.img_sizes for size in build_buckets(img_size, multiple).sizes}
    side = max(data.control_size // multiple, 1) * multiple
    of_target = max(image_tokens(family, folder, (size,)) for size in sizes)
    return BesideTransformer(
        of_target + num_controls * image_tokens(family, folder, ((side, side),)),
        data.max_text_tokens or TEXT_TOKENS,
        max(own.img_size, side if num_controls else 0) ** 2,
        num_controls,
    )


def _num_controls(own: Folder, rules: ControlRules | None) -> int:
    """Returns the control pictures of an example: as many as there are folders of them, else one."""
    return min(rules.most, max(len(own.control_dirs), 1)) if rules else 0


def _digest(config: TrainConfig, shards: Shards, encoder: Encoder) -> str:
    """Returns a hash over everything that decides what is trained on, as far as it is known before it is read."""
    (own,) = folders_of(config.data_config)
    columns = own.dataset and (own.dataset.split, own.dataset.image, own.dataset.caption, own.dataset.control)
    nothing = FramedPicture("", own.img_dir, "", Framing(1, 1, 1.0, (0.0, 0.0, 1.0, 1.0), 0.0))
    keys = [encoder.text_key_builder()(TextItem("")).digest, encoder.latent_key_builder()(nothing).digest]
    return hashlib.sha256(json.dumps([list(shards.names), columns, keys]).encode()).hexdigest()


def _begun(config: TrainConfig, reader: Reader) -> StreamState:
    """Returns the state of a stream at its beginning, with the rows that it holds out."""
    num_shards, settings = len(reader.shards.names), config.validation
    state = StreamState(first_position(num_shards, config.stream.shards_at_once))
    if settings.held_out != "auto" or settings.held_out_dir is not None:
        return state
    rows, num_read = reader.first_rows(AUTO_MOST, AUTO_FROM)
    return replace(state, held_out=tuple(rows), held_out_rows=num_read)


def _restored(stored: Tensor, shards: Shards, config: TrainConfig) -> StreamState:
    state, num_shards = from_tensor(stored), len(shards.names)
    places = [row.place for row in (*state.rows.values(), *state.held_out)]
    if len(state.position.lanes) != min(num_shards, config.stream.shards_at_once) or any(
        place.shard >= num_shards for place in places
    ):
        raise CheckpointError(
            f"the checkpoint's position is of a stream with other shards: there are {num_shards} now. Put them back as "
            "they were, or start a new run."
        )
    return state
