"""What an artefact must prove before it is written: properties 1 to 6, and a negative control of the mask.

The proofs see a network only through `Calls`, numpy in and out, so the same code judges the torch network and the
ONNX graphs. A property that does not hold raises `ProofError` naming it, and so does a call that fails while one is
looked at. Independent of families and files.
"""

import abc
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.networks.interface import MaskKind
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import ArtefactError
from kvcast.protocol.schema import FeatureSchema, Field, KVLayout
from kvcast.protocol.tensors import SCORE_TOLERANCE

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
BLIND = "property 1, user KV ignores candidates"
TOGETHER = "property 2, N candidates together = each alone"
PERMUTED = "property 3, permuting candidates permutes scores"
DIFFERENT = "property 4, different candidates get different scores"
PADDING = "property 5, padding changes nothing"
EXACT = "property 6, cached path = monolith"
RESIDENT = "property 6, resident path = cached path"
# Requests at the limits are held against requests of so many candidates, after so many events.
SMALL_REQUEST, SHORT_HISTORY = 5, 3
# A longer history takes the monolith too much memory and time.
LONG_HISTORY = 1024


class ProofError(ArtefactError):
    """The artefact does not have a property that serving relies on."""


class Calls(abc.ABC):
    """The three calls of a network, on numpy arrays, however they are computed.

    User KV is a list of M keys `[B, H, key_rows, slots]` and then M values `[B, H, slots, value_columns]`.
    """

    @abc.abstractmethod
    def encode_user(self, history: Ids) -> list[Floats]:
        """INT64 `[B, L, history_fields]` → the user KV."""

    @abc.abstractmethod
    def fuse(self, user_kv: list[Floats], candidates: Ids) -> Floats:
        """User KV and INT64 `[B, N, T]` → scores FP32 `[B, N]`."""

    @abc.abstractmethod
    def rank_resident(
        self, history: Ids, candidates: Ids, past: list[Floats], *, use_past: bool
    ) -> tuple[Floats, list[Floats]]:
        """Both sides in one call, or with the KV that an earlier such call made → scores FP32 `[B, N]`, user KV."""

    @abc.abstractmethod
    def run_monolith(self, history: Ids, candidates: Ids) -> Floats:
        """Every candidate in a full sequence of its own, mask target-blind → scores FP32 `[B, N]`."""

    def rank(self, history: Ids, candidates: Ids) -> Floats:
        """Encode, then fuse: the cached path."""
        return self.fuse(self.encode_user(history), candidates)


@dataclass(frozen=True)
class Sample:
    """A random request: history INT64 `[1, L, history_fields]`, candidates INT64 `[1, N, T]`, all different."""

    history: Ids
    candidates: Ids


# Keys of the user tokens inside the monolith, per layer, for given candidates and mask.
UserKeysProbe = Callable[[Ids, Ids, MaskKind], list[Floats]]


def draw_sample(schema: FeatureSchema, history_length: int, count: int, seed: int) -> Sample:
    """Draw a request without padding, whose candidates differ in their target field, or if it has too few ids in any.

    Where the fields have too few ids for `count` different candidates, there are as many as they allow, at least two.
    """
    generator = np.random.default_rng(seed)
    history = draw_ids(schema.history_fields, history_length, generator)
    candidates = draw_ids(schema.candidate_fields, count, generator)
    target = schema.candidate_fields[0]
    if count < target.vocab_size:
        candidates[:, 0] = generator.choice(np.arange(1, target.vocab_size), count, replace=False)
    else:
        candidates = _list_different(schema.candidate_fields, count)
    return Sample(history[None], candidates[None])


def _list_different(fields: tuple[Field, ...], most: int) -> Ids:
    """Return different rows `[at most this many, fields]`, of known ids first."""
    known = [range(1, min(field.vocab_size, most + 1)) for field in reversed(fields)]  # the target field changes first
    any_ids = [(*ids, 0) for ids in known]
    parts = itertools.product(*known), itertools.product(*any_ids)
    rows = [row for part in parts for row in itertools.islice(part, 2 * most)]
    return np.array([row[::-1] for row in dict.fromkeys(rows)], np.int64)[:most]


def draw_ids(fields: tuple[Field, ...], rows: int, generator: np.random.Generator) -> Ids:
    """Draw INT64 `[rows, fields]`, every id at least 1, so that no row is padding."""
    return np.stack([generator.integers(1, field.vocab_size, rows) for field in fields], axis=1)


def prove(calls: Calls, sample: Sample, layout: KVLayout) -> float:
    """Prove properties 1 to 6 on one sample.

    Args:
        calls: the network, or its ONNX graphs.
        sample: a request.
        layout: of the user KV that `rank_resident` takes and gives.

    Returns:
        The largest difference of scores between the cached path and the monolith.

    Raises:
        ProofError: a property does not hold; the message names it.
    """
    with _proving("scores"):
        user_kv = calls.encode_user(sample.history)
        scores = calls.fuse(user_kv, sample.candidates)
    if scores.shape != sample.candidates.shape[:2] or not np.isfinite(scores).all():
        raise ProofError(f"scores: expected finite {list(sample.candidates.shape[:2])}, got {scores}")
    with _proving(BLIND):
        _prove_kv_ignores_candidates(calls, sample, user_kv)
    with _proving(TOGETHER):
        _prove_together_equals_alone(calls, sample, user_kv, scores)
    with _proving(PERMUTED):
        _prove_permutation(calls, sample, user_kv, scores)
    _prove_different_scores(scores)
    with _proving(PADDING):
        _prove_padding_changes_nothing(calls, sample, scores)
    with _proving(EXACT):
        error = _prove_cached_equals_monolith(calls, sample, scores)
    with _proving(RESIDENT):
        return max(error, _prove_resident_equals_cached(calls, sample, scores, layout))


def prove_limits(calls: Calls, config: ModelConfig, layout: KVLayout) -> float:
    """Prove that the largest requests score as small ones do, for which the properties are proved.

    Each of `limits.candidates` slots must score as in a small request, by every path and in both orders; and one
    candidate after a long history (`limits.history` events, at most `LONG_HISTORY`) as in the monolith.

    Args:
        calls: the network, or its ONNX graphs.
        config: says the limits.
        layout: of the user KV that `rank_resident` takes and gives.

    Returns:
        The largest difference of scores.

    Raises:
        ProofError: a request scores otherwise; the message names the property.
    """
    generator, schema, count = np.random.default_rng(3), config.schema, config.limits.candidates
    history = draw_ids(schema.history_fields, SHORT_HISTORY, generator)[None]
    candidates = draw_ids(schema.candidate_fields, count, generator)[None]
    name = f"{TOGETHER} ({count} candidates"
    with _proving(TOGETHER):
        user_kv = calls.encode_user(history)
        parts = [candidates[:, start : start + SMALL_REQUEST] for start in range(0, count, SMALL_REQUEST)]
        expected = np.concatenate([calls.fuse(user_kv, part) for part in parts], axis=1)
        cold, made = calls.rank_resident(history, candidates, make_no_user_kv(layout, 1), use_past=False)
        warm, _ = calls.rank_resident(np.zeros_like(history[:, :1]), candidates, made, use_past=True)
        paths = {
            "cached path": calls.fuse(user_kv, candidates),
            "cached path, reversed": calls.fuse(user_kv, candidates[:, ::-1])[:, ::-1],
            "resident path, cold": cold,
            "resident path, warm": warm,
            "monolith": calls.run_monolith(history, candidates),
        }
        error = max(_expect_equal(f"{name}, {path})", expected, got) for path, got in paths.items())
    length = min(config.limits.history, LONG_HISTORY)
    history = draw_ids(schema.history_fields, length, generator)[None]
    with _proving(EXACT):
        expected = calls.run_monolith(history, candidates[:, :1])
        got = calls.rank(history, candidates[:, :1])
        return max(error, _expect_equal(f"{EXACT} ({length} events)", expected, got))


@contextlib.contextmanager
def _proving(name: str) -> Iterator[None]:
    """Name the property that was looked at when a call failed."""
    try:
        yield
    except ProofError:
        raise
    except Exception as error:  # a family's own mistakes have any type
        raise ProofError(f"{name}: a call failed: {type(error).__name__}: {error}") from error


def prove_layout(user_kv: list[Floats], sample: Sample, layout: KVLayout) -> None:
    """Prove that user KV has the shapes that `kv_layout` says.

    Args:
        user_kv: of the sample's history, M keys and then M values.
        sample: a request.
        layout: what the network says of its user KV.

    Raises:
        ProofError: a shape is another.
    """
    length = sample.history.shape[1]
    wanted = [layout.keys_shape(length)[1:]] * layout.layers + [layout.values_shape(length)[1:]] * layout.layers
    got = [array.shape[1:] for array in user_kv]
    if got != wanted:
        raise ProofError(
            f"kv_layout: expected {layout.layers} keys [B, {', '.join(map(str, wanted[0]))}] and as many values "
            f"[B, {', '.join(map(str, wanted[-1]))}] of {length} events, got {[list(shape) for shape in got]}"
        )
    if not math.isfinite(layout.mask_value):
        raise ProofError(
            f"kv_layout: expected a finite mask_value, got {layout.mask_value}: models refuse KV that is not finite; "
            "a large negative number, such as -1e9, does the same"
        )
    if not 0 <= layout.mask_row < layout.key_rows:
        raise ProofError(f"kv_layout: expected mask_row within 0..{layout.key_rows - 1}, got {layout.mask_row}")


def prove_history_is_blind(probe: UserKeysProbe, schema: FeatureSchema, sample: Sample) -> None:
    """Prove property 1 inside the monolith, and run its negative control.

    Under the target-blind mask other candidates must leave the user tokens' keys bit-identical in every layer. Under
    the undirected mask they must change them from layer 2 on: if they do not, the first result proves nothing.

    Raises:
        ProofError: one of the two does not hold.
    """
    count = sample.candidates.shape[1]
    drawn = draw_sample(schema, 1, count + 1, seed=count + 1).candidates
    others = drawn[:, -count:]
    if np.array_equal(others, sample.candidates):  # there are no others
        others = others[:, ::-1]
    with _proving(BLIND):
        blind, blind_others = (probe(sample.history, c, "target_blind") for c in (sample.candidates, others))
    for layer, (keys, other_keys) in enumerate(zip(blind, blind_others, strict=True), start=1):
        if not np.array_equal(keys, other_keys):
            raise ProofError(f"{BLIND}: layer {layer} changes with the candidates")
    with _proving("negative control"):
        seeing, seeing_others = (probe(sample.history, c, "undirected") for c in (sample.candidates, others))
    for layer, (keys, other_keys) in enumerate(zip(seeing, seeing_others, strict=True), start=1):
        if np.array_equal(keys, other_keys) != (layer == 1):
            raise ProofError(
                "negative control: under the undirected mask the candidates should change user KV from layer 2 on, "
                f"and layer {layer} does not behave so"
            )


def _prove_kv_ignores_candidates(calls: Calls, sample: Sample, user_kv: list[Floats]) -> None:
    calls.fuse(user_kv, sample.candidates[:, ::-1])
    again = calls.encode_user(sample.history)
    if not all(np.array_equal(first, second) for first, second in zip(user_kv, again, strict=True)):
        raise ProofError(f"{BLIND}: encoding again gives other bits")


def _prove_together_equals_alone(calls: Calls, sample: Sample, user_kv: list[Floats], scores: Floats) -> None:
    count = scores.shape[1]
    again = calls.fuse(user_kv, sample.candidates)
    _expect_equal(f"{TOGETHER} (the same call twice)", scores, again)
    alone = [calls.fuse(user_kv, sample.candidates[:, [index]]) for index in range(count)]
    _expect_equal(TOGETHER, scores, np.concatenate(alone, axis=1))


def _prove_permutation(calls: Calls, sample: Sample, user_kv: list[Floats], scores: Floats) -> None:
    order = np.random.default_rng(0).permutation(scores.shape[1])
    if len(order) == 2:  # which this lottery leaves as they are
        order = order[::-1]
    permuted = calls.fuse(user_kv, sample.candidates[:, order])
    _expect_equal(PERMUTED, scores[:, order], permuted)


def _prove_different_scores(scores: Floats) -> None:
    if len(np.unique(scores)) < scores.size:
        raise ProofError(
            f"{DIFFERENT}: got only {len(np.unique(scores))} different scores for {scores.size} candidates"
        )


def _prove_padding_changes_nothing(calls: Calls, sample: Sample, scores: Floats) -> None:
    name, history = PADDING, sample.history
    for places, where in (([0, 0, 0], "front"), ([history.shape[1]] * 3, "end"), ([1, 2, 2], "middle")):
        padded = np.insert(history, places, 0, axis=1)
        _expect_equal(f"{name} ({where})", scores, calls.rank(padded, sample.candidates))
    # In a batch with a longer history, as the models pack it, and the two users in both orders.
    half = history[:, : history.shape[1] // 2]
    short = np.pad(half, ((0, 0), (0, history.shape[1] - half.shape[1]), (0, 0)))
    expected = np.concatenate([scores, calls.rank(half, sample.candidates)])
    both = np.repeat(sample.candidates, 2, axis=0)
    _expect_equal(f"{name} (batch)", expected, calls.rank(np.concatenate([history, short]), both))
    _expect_equal(f"{name} (batch)", expected[::-1], calls.rank(np.concatenate([short, history]), both))
    nothing = [np.zeros((1, length, history.shape[2]), np.int64) for length in (1, 3)]
    empty, more = (calls.rank(padding, sample.candidates) for padding in nothing)
    _expect_equal(f"{name} (empty history)", empty, more)


def _prove_cached_equals_monolith(calls: Calls, sample: Sample, scores: Floats) -> float:
    name = EXACT
    error = _expect_equal(name, calls.run_monolith(sample.history, sample.candidates), scores)
    padding = np.zeros_like(sample.history[:, :2])
    empty = calls.run_monolith(padding, sample.candidates)
    return max(error, _expect_equal(f"{name} (empty history)", empty, calls.rank(padding, sample.candidates)))


def _prove_resident_equals_cached(calls: Calls, sample: Sample, scores: Floats, layout: KVLayout) -> float:
    """Cold, warm with other candidates in between, and warm with KV that was padded to share a run."""
    name = RESIDENT
    history, candidates = sample.history, sample.candidates
    nothing, no_event = make_no_user_kv(layout, 1), np.zeros_like(history[:, :1])
    cold, made = calls.rank_resident(history, candidates, nothing, use_past=False)
    error = _expect_equal(f"{name} (cold)", scores, cold)
    before = [array.copy() for array in made]
    calls.rank_resident(no_event, candidates[:, ::-1], made, use_past=True)
    if not all(np.array_equal(first, second) for first, second in zip(before, made, strict=True)):
        raise ProofError(f"{BLIND}: fusing wrote into past KV")
    warm, _ = calls.rank_resident(no_event, candidates, made, use_past=True)
    error = max(error, _expect_equal(f"{name} (warm)", scores, warm))
    warm, _ = calls.rank_resident(no_event, candidates, add_padding_slots(made, layout), use_past=True)
    padding = f"slots as kv_layout says: mask_row {layout.mask_row}, mask_value {layout.mask_value:g}"
    _expect_equal(f"{PADDING} ({padding})", scores, warm)
    half, others = history[:, : history.shape[1] // 2], candidates[:, ::-1]
    expected = calls.rank(half, others)
    short = np.pad(half, ((0, 0), (0, history.shape[1] - half.shape[1]), (0, 0)))
    both, both_candidates = np.concatenate([history, short]), np.concatenate([candidates, others])
    packed, past = calls.rank_resident(both, both_candidates, make_no_user_kv(layout, 2), use_past=False)
    error = max(error, _expect_equal(f"{name} (cold batch)", np.concatenate([scores, expected]), packed))
    warm, _ = calls.rank_resident(np.zeros_like(both[:, :1]), both_candidates, past, use_past=True)
    return max(error, _expect_equal(f"{name} (warm batch)", np.concatenate([scores, expected]), warm))


def make_no_user_kv(layout: KVLayout, users: int) -> list[Floats]:
    """Return KV of empty histories, layer by layer, to be given where there is none."""
    shapes = [layout.keys_shape(0)] * layout.layers + [layout.values_shape(0)] * layout.layers
    return [np.zeros((users, *shape[1:]), np.float32) for shape in shapes]


def add_padding_slots(user_kv: list[Floats], layout: KVLayout, slots: int = 3) -> list[Floats]:
    """Return KV, layer by layer, with padding slots behind it, as the runtime adds them where users share a run."""
    padded = []
    for array in user_kv[: layout.layers]:
        keys = np.pad(array, ((0, 0), (0, 0), (0, 0), (0, slots)))
        keys[:, :, layout.mask_row, -slots:] = layout.mask_value
        padded.append(keys)
    return padded + [np.pad(array, ((0, 0), (0, 0), (0, slots), (0, 0))) for array in user_kv[layout.layers :]]


def _expect_equal(name: str, expected: Floats, got: Floats) -> float:
    """Return the largest difference, which must be within `SCORE_TOLERANCE`."""
    if expected.shape != got.shape:
        raise ProofError(f"{name}: expected scores of shape {list(expected.shape)}, got {list(got.shape)}")
    difference = float(np.abs(expected - got).max())
    if not difference <= SCORE_TOLERANCE:  # a NaN fails too
        first = np.argwhere(~(np.abs(expected - got) <= SCORE_TOLERANCE))[0].tolist()  # user, slot
        raise ProofError(
            f"{name}: expected scores equal to {SCORE_TOLERANCE}, got a difference of {difference:.3g}, "
            f"the first at {first}"
        )
    return difference
