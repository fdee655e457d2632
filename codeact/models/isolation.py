"""What packing asks of a causal model: which samples may share a pass, its LM head, and a proof that none sees another.

Shapes: T tokens of a pass, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from codeact.base.devices import to_device
from codeact.base.errors import InputError, require
from codeact.models.fused_layers import fused_layers
from codeact.ops.attention import ATTENTION, PackedBatch, isolating_attention, native_runs

_SHORT = (5, 9, 7)  # tokens of the samples that every proof runs
_EDGE = 8  # of a longer sample, so many tokens at either end are compared
_TOLERANCE = 0.05  # of the largest logit, between runs in 16 bits that round in another order
_EDGES = (  # lengths beyond which a model may compute in another way
    *("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"),
    *("max_position_embeddings", "original_max_position_embeddings", "floor_scale"),
)
_KINDS = ("layer_types", "layers_block_type", "attention_layers", "block_types")  # of the layers, one after the other
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


# ------------------------------------------------------------------------------- which samples may share a forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRule:
    """Which samples may share a forward pass, by their lengths in tokens.

    ``switches``: samples of at most so many tokens never share a pass with longer ones (RoPE ``longrope`` takes its
    factors by the longest position of the pass). ``shared``: a pass with more tokens than that holds one sample only
    (RoPE ``dynamic`` has other frequencies for every length above; Llama 4 scales queries by the place in the pass;
    GPT-Neo's mask is a table of that size). ``PassRule(shared=1)`` gives every sample a pass of its own.
    """

    switches: tuple[int, ...] = ()
    shared: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> PassRule:
        """Read the rule out of a model's configuration."""
        config = model.config.get_text_config()
        switches, shared = set(), []
        for rope in _ropes(config):
            kind = rope.get("rope_type", rope.get("type"))
            if kind == "longrope":
                switches.add(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
            elif kind == "dynamic":
                shared.append(config.max_position_embeddings)
        if getattr(config, "attn_temperature_tuning", False) and getattr(config, "floor_scale", None):
            shared.append(int(config.floor_scale) - 1)
        shared += [buffer.shape[-1] for buffer in model.buffers() if buffer.ndim == 4 and buffer.dtype == torch.bool]
        return cls(switches=tuple(sorted(switches)), shared=min(shared, default=None))

    def keys(self, lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64 (N,): samples of different keys never share a pass."""
        lengths = np.asarray(lengths, dtype=np.int64)
        keys = np.searchsorted(np.array(self.switches, dtype=np.int64), lengths)
        return keys if self.shared is None else np.where(lengths > self.shared, len(self.switches) + lengths, keys)

    def capacity(self, length: int, tokens: int) -> int:
        """Return how many tokens may be in a pass of samples like one of ``length``, if ``tokens`` fit in memory."""
        return tokens if self.shared is None else 1 if length > self.shared else min(tokens, self.shared)

    def inputs(self, batch: PackedBatch, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of a model for one pass; of one sample where no two ever share one."""
        if self.shared == 1:  # some models refuse whatever speaks of packs
            return {"input_ids": to_device(batch.input_ids, device), "use_cache": False}
        return batch.model_inputs(device)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings that a configuration names: one, or one a kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _passes(rule: PassRule, lengths: Sequence[int], most: int) -> list[list[int]]:
    """Put samples into as few passes, of ``most`` tokens, as the rule allows; returns their numbers."""
    keys = rule.keys(lengths)
    passes: list[list[int]] = []
    for number, length in enumerate(lengths):
        for members in passes:
            tokens = sum(lengths[member] for member in members) + length
            if keys[members[0]] == keys[number] and tokens <= rule.capacity(length, most):
                members.append(number)
                break
        else:
            passes.append([number])
    return passes


def forget_longest(model: torch.nn.Module) -> None:
    """Make RoPE ``dynamic`` start every pass anew.

    It keeps the frequencies of the longest sample that it has seen until a short one comes, so that a pass would depend
    on the ones before.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if "dynamic" in kinds and not getattr(module, "_codeact_forgets", False):
            module.register_forward_pre_hook(_forget)
            module._codeact_forgets = True  # type: ignore[assignment]


def _forget(rotary: Any, *_: Any) -> None:
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    for layer, kind in kinds.items():
        prefix = f"{layer}_" if layer else ""
        if kind == "dynamic" and hasattr(rotary, f"{prefix}max_seq_len_cached"):
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
            frequencies = getattr(rotary, f"{prefix}original_inv_freq")
            setattr(rotary, f"{prefix}inv_freq", frequencies.to(getattr(rotary, f"{prefix}inv_freq").device))


def round_row_by_row(model: torch.nn.Module) -> None:
    """Make LLM.int8() round every token by itself.

    Otherwise which columns it leaves in 16 bits follows from all tokens of a pass, so that what a sample gets depends
    on the others, packed or padded.
    """
    for module in model.modules():
        state = getattr(module, "state", None)
        if state is not None and hasattr(state, "threshold"):
            state.threshold = 0.0


# ------------------------------------------------------------------------------------------------------------- the head


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """What turns hidden states into logits: ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    ``weight``: (V, D); ``bias``: (V,) or None; ``softcap``: None where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def scaled(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states and bias that hold the scale, for a loss that knows none."""
        if self.scale == 1.0:
            return hidden, self.bias
        return hidden * self.scale, None if self.bias is None else self.bias * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., D) -> (..., V)."""
        hidden, bias = self.scaled(hidden)
        logits = torch.nn.functional.linear(hidden, self.weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def trunk_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """Return what makes hidden states of token ids, or None: the model has no such part of its own."""
    for trunk in (model.base_model, getattr(model, "model", None), getattr(model, "transformer", None)):
        if isinstance(trunk, torch.nn.Module) and trunk is not model:
            return trunk
    return None


def read_head(model: PreTrainedModel) -> LmHead:
    """Read the LM head of a causal model, with what its configuration says of scale and softcap.

    Raises:
        InputError: it has none.
    """
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or trunk_of(model) is None:
        raise InputError(f"{type(model).__name__} is no causal language model with a plain LM head")
    config = model.config.get_text_config()
    scale = math.prod(getattr(config, name, None) or 1.0 for name in _SCALES)
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LmHead(
        weight=weight,
        bias=getattr(output, "bias", None),
        scale=scale * divisor if config.model_type == "hyperclovax" else scale / divisor,
        softcap=next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None),
    )


def split_head(model: PreTrainedModel) -> tuple[torch.nn.Module, LmHead]:
    """Split a causal model into its trunk (ids -> hidden states) and its LM head, and prove it on a small sample.

    Raises:
        InputError: the model has no such head, or its logits are not what the head makes of the hidden states.
    """
    head = read_head(model)
    trunk = trunk_of(model)
    assert trunk is not None
    ids = to_device(_sample(model, 9)[None], head.weight.device)
    with computing(model), refusals_of(model):
        own = head.logits(trunk(input_ids=ids, use_cache=False).last_hidden_state)
        logits = model(input_ids=ids, use_cache=False).logits
    if (difference := _difference(own, logits)) is not None:
        raise InputError(
            f"{type(model).__name__} has an LM head that is more than a linear layer with a scale and a softcap "
            f"({difference}); it cannot be scored"
        )
    return trunk, head


# ------------------------------------------------------------------------------------------------------------ the proof


@contextmanager
def computing(model: Any, attention: str | None = None) -> Iterator[None]:
    """Let a model compute as it does outside of training, its layers fused, with another attention; then undo all.

    Raises:
        InputError: the model does not take that attention.
    """
    before, training = model.config._attn_implementation, model.training
    set_attention(model, before if attention is None else attention)
    model.eval()
    try:
        with torch.inference_mode(), fused_layers(model):
            yield
    finally:
        model.train(training)
        set_attention(model, before)


def set_attention(model: Any, attention: str) -> None:
    """Give a model an attention, a name that transformers knows.

    Raises:
        InputError: the model does not take it.
    """
    if model.config._attn_implementation == attention:
        return
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"attention {attention!r} does not work with {type(model).__name__}: {reason}") from None


def plain_attention(model: Any) -> str:
    """Return PyTorch's attention if the model takes it, else eager: what one sample by itself is right under."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def packing_attention(model: Any, device: torch.device) -> str:
    """Return the attention for packs of this model on ``device``, best first.

    Raises:
        InputError: nothing there keeps the samples of a pack apart.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    # Flash attention knows no chunks, and counts them along the pack.
    return ATTENTION if "chunked_attention" in kinds else isolating_attention(device)


def isolate(model: Any, max_length: int, attention: str = "auto") -> str:
    """Make a model fit for packs in whatever trains it: set an attention that keeps samples apart, and prove it.

    Args:
        model: a causal transformers model, on the device and in the dtype that it will compute in.
        max_length: tokens of the longest sample, and of the fullest pass, that there will be.
        attention: a name that transformers knows; "auto": the best one for packs on the model's device.

    Returns:
        The attention that was set.

    Raises:
        InputError: samples of a pack are not apart under it; the message names the attention that helps, if one does.
    """
    require("model", model, "get_input_embeddings", "a causal model of transformers")
    device = model.get_input_embeddings().weight.device
    attention = packing_attention(model, device) if attention == "auto" else attention
    prove_isolation(model, attention, max_length, otherwise="its architecture looks across samples: do not pack")
    set_attention(model, attention)
    return attention


def prove_isolation(
    model: PreTrainedModel,
    attention: str,
    longest: int,
    rule: PassRule | None = None,
    otherwise: str = "",
    tokens: int = 0,
) -> None:
    """Prove that a sample gets the same logits in a pass with others as by itself.

    Samples are run through the whole model in the passes that ``rule`` allows, with ``attention``, and one by one with
    PyTorch's. This catches an attention that lets samples see each other or that forgets a window, a recurrent state
    carried from one to the next, and whatever follows from the number or the length of the samples of a pass: experts
    that take so many tokens and no more, keys that are chosen among all of the pass. Besides short samples there is
    one of either side of every length that the configuration names and ``longest`` reaches, the longest one, and a
    pass as full as any that there will be, as nothing says where a model begins to compute in another way.

    Args:
        model: a causal model; its attention and its mode stay what they are.
        attention: what packs will be run with.
        longest: tokens of the longest sample that there will be.
        rule: by default ``PassRule.of(model)``.
        otherwise: what the user can do where no attention helps; the end of the message.
        tokens: of the fullest pass that there will be; a longer sample has a pass of its own.

    Raises:
        InputError: they do not agree. The message names the attention that does, if there is one.
    """
    forget_longest(model)
    round_row_by_row(model)
    rule = rule or PassRule.of(model)
    reason = _leak(model, attention, longest, rule, tokens)
    if reason is None:
        return
    others = [name for name in ("sdpa", "eager", ATTENTION) if name != attention]
    helping = [name for name in others if _leak(model, name, longest, rule, tokens) is None]
    remedy = f"say --attention {helping[0]}, which keeps them apart" if helping else otherwise
    raise InputError(f"{type(model).__name__} cannot be packed with {attention}: {reason}{'; ' * bool(remedy)}{remedy}")


def may_share_prefixes(model: PreTrainedModel, attention: str, rule: PassRule, tokens: int, bits: bool = False) -> bool:
    """Whether it can be at all that samples which begin alike have their beginning computed once.

    Not where how a sample is computed follows from its length. ``bits``: so that no bit changes, in passes of up to
    ``tokens``: by the compiled attention alone, which has no softcap, no sinks and no window.
    """
    weight = model.get_input_embeddings().weight
    if attention != ATTENTION or weight.device.type != "cpu" or rule.switches or rule.shared is not None:
        return False
    if not bits:
        return True
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    others = getattr(config, "attn_logit_softcapping", None) or any(
        "sinks" in name for name, _ in model.named_parameters()
    )
    return native_runs(weight, weight, weight) and not others and not (window and window < tokens)


def shares_prefixes(model: PreTrainedModel, attention: str, rule: PassRule, longest: int, bits: bool = False) -> bool:
    """Whether samples that begin alike may have their beginning computed once, with the logits that they get alone.

    Tried on the model, as isolation is: a short beginning, and one that reaches to every length that the configuration
    names and ``longest`` reaches. ``bits``: only where no bit changes.
    """
    if not may_share_prefixes(model, attention, rule, longest, bits):
        return False
    edges = sorted(edge for edge in _edge_samples(model, longest, rule) if edge > max(_SHORT))
    for before, layers in ((_SHORT[1], None), *((edge - _SHORT[0] // 2, few_layers(model)) for edge in edges)):
        beginning, *rests = (_sample(model, length, seed) for seed, length in enumerate((before, *_SHORT[::2])))
        rests = [rest[: max(1, longest - before)] for rest in rests]
        try:
            with refusals_of(model), only_layers(model, layers), computing(model, attention):
                alone = torch.cat([_logits(model, [torch.cat([beginning, r])])[-min(len(r), _EDGE) :] for r in rests])
                packed = _logits(model, [beginning, *rests], rule, [-1, 0, 0])[-len(alone) :]
        except InputError:
            return False
        if bits and not torch.equal(packed, alone):
            return False
        if _difference(packed, alone, _TOLERANCE / 5, bool(getattr(model, "is_quantized", False))):
            return False
    return True


def _leak(model: PreTrainedModel, attention: str, longest: int, rule: PassRule, tokens: int) -> str | None:
    """Why samples of a pass are not apart, or None: they are."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and not any("dynamic" in rope.values() for rope in _ropes(config)):  # a table may have no more
        longest = min(longest, positions)
    most = max(tokens, longest)

    def differ(lengths: list[int], layers: int | None) -> str | None:
        return _difference_of_passes(model, attention, rule, lengths, most, layers)

    if reason := differ(list(_SHORT), None):
        return reason
    few = few_layers(model)
    # A few layers show a leak as well as all; but not every model can be cut, so what they say is tried on all.
    edges = _edge_samples(model, longest, rule)
    if edges and differ(edges, few) and (reason := differ(edges, None)):
        return reason
    while True:
        full = _full_pass(longest, most, rule)
        try:
            return differ(full, None) if full and differ(full, few) else None
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            most //= 2  # whoever packs makes smaller packs as well, or says that even one sample is too long
            if most < longest:
                return None


def _difference_of_passes(
    model: PreTrainedModel, attention: str, rule: PassRule, lengths: list[int], most: int, layers: int | None
) -> str | None:
    """How samples of these lengths differ between the passes that the rule allows and one by one, or None."""
    samples = [_sample(model, length, seed) for seed, length in enumerate(lengths)]
    passes = _passes(rule, lengths, most)
    order = list(itertools.chain.from_iterable(passes))
    try:
        with refusals_of(model), only_layers(model, layers):
            with computing(model, plain_attention(model)):
                plain = torch.cat([_logits(model, [samples[number]]) for number in order])
            with computing(model, attention):
                alone = torch.cat([_logits(model, [samples[number]], rule) for number in order])
                packed = torch.cat([_logits(model, [samples[n] for n in members], rule) for members in passes])
    except InputError as error:
        return str(error)
    sizes = "/".join(map(str, lengths))
    # Nothing stands before the first sample of a pack: what happens to it is rounding, or comes from the whole pass.
    rounding = 4 * _distance(packed[: _SHORT[0]], alone[: _SHORT[0]])
    coarse = bool(getattr(model, "is_quantized", False))  # layers compute in 16 bits, whatever the logits are
    if difference := _difference(packed, alone, min(max(rounding, _TOLERANCE / 5), _TOLERANCE), coarse):
        return f"in a pack, samples of {sizes} tokens get other logits than alone ({difference})"
    # In 16 bits another attention rounds in another order, and the first token of a text is sensitive to it.
    if difference := _difference(alone, plain, 5 * _TOLERANCE, coarse):
        return f"samples of {sizes} tokens get other logits than with {plain_attention(model)} ({difference})"
    return None


def _edge_samples(model: Any, longest: int, rule: PassRule) -> list[int]:
    """One sample of either side of every length that the configuration names, beside short ones."""
    config = model.config.get_text_config()
    named = [rope.get(name) for rope in _ropes(config) for name in _EDGES]
    named += [*(getattr(config, name, None) for name in _EDGES), *rule.switches, rule.shared]
    # The short samples have seen to the lengths below theirs.
    edges = sorted({edge for edge in named if isinstance(edge, int) and max(_SHORT) <= edge < longest})
    return [*_SHORT[:2], *(length for edge in edges for length in (edge + 1, min(edge + 2, longest)))] if edges else []


def _full_pass(longest: int, most: int, rule: PassRule) -> list[int]:
    """Samples that fill a pass, each half of what is left; and the longest, where it leaves no room for others."""
    if rule.shared == 1 or longest <= max(_SHORT):
        return []
    lengths, left = [longest] * (longest > most // 2), most
    while left > 2 * max(_SHORT):
        lengths.append(min(longest, left // 2))
        left -= lengths[-1]
    return [*lengths, left]


def _sample(model: Any, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.get_input_embeddings().weight.shape[0], (length,), generator=generator)


def _logits(
    model: Any, samples: list[Tensor], rule: PassRule = PassRule(shared=1), prefixes: list[int] | None = None
) -> Tensor:
    """Logits (T, V) of the first and last tokens of every sample of one pass."""
    batch = PackedBatch.from_samples([sample.numpy() for sample in samples], prefixes)
    device = model.get_input_embeddings().weight.device
    inputs = rule.inputs(batch, device)
    position = torch.cat([torch.arange(len(sample)) for sample in samples])
    last = torch.tensor([len(sample) - 1 for sample in samples])
    last = last.repeat_interleave(torch.tensor([len(sample) for sample in samples]))
    kept = ((position < _EDGE) | (last - position < _EDGE)).nonzero().flatten()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=to_device(kept, device)).logits[0]  # type: ignore[no-any-return]
    return model(**inputs).logits[0, to_device(kept, device)]  # type: ignore[no-any-return]


def few_layers(model: Any) -> int | None:
    """So many layers hold one of every kind, by its modules and what the configuration calls it; None: all of them."""
    if (stack := _stack(model)) is None:
        return None
    config = model.config.get_text_config()
    named = [list(kinds) for name in _KINDS if (kinds := getattr(config, name, None))]
    kinds = [
        (*(type(part) for part in layer.modules()), *(names[number % len(names)] for names in named))
        for number, layer in enumerate(stack[2])
    ]
    return max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))


def _stack(model: Any) -> tuple[torch.nn.Module, str, torch.nn.ModuleList] | None:
    """The list of a model's layers, with what holds it and under which name."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = ((part, name, child) for part in model.modules() for name, child in part.named_children())
    return next((s for s in stacks if isinstance(s[2], torch.nn.ModuleList) and len(s[2]) == depth), None)


@contextmanager
def only_layers(model: Any, count: int | None) -> Iterator[None]:
    """Let a model run its first few layers only; None: all."""
    stack = _stack(model)
    if count is None or stack is None or count >= len(stack[2]):
        yield
        return
    part, name, layers = stack
    setattr(part, name, layers[:count])
    config = model.config.get_text_config()
    config.num_hidden_layers = count
    try:
        yield
    finally:
        setattr(part, name, layers)
        config.num_hidden_layers = len(layers)


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits, in units of the largest logit; a few rows at a time, which the cache holds."""
    apart, size = [], []
    for a, b in zip(torch.split(ours, 64), torch.split(theirs, 64), strict=True):
        apart.append((a.float() - b.float()).abs().max())
        size.append(b.float().abs().max())
    return float(torch.stack(apart).max() / torch.stack(size).max())


def _difference(ours: Tensor, theirs: Tensor, tolerance: float = _TOLERANCE, coarse: bool = False) -> str | None:
    """How far logits are apart, or None: no further than ``tolerance``, or than rounding where all is float32."""
    distance = _distance(ours, theirs)
    # Written so that a NaN is a difference.
    fits = distance <= (1e-3 if ours.dtype == torch.float32 and not coarse else tolerance)
    return None if fits else f"they differ by {distance:.2g} of the largest"


@contextmanager
def refusals_of(model: PreTrainedModel) -> Iterator[None]:
    """Turn what a model or an attention refuses (a dtype, a softcap, sinks) into one line.

    Raises:
        InputError: it raised something; want of memory is raised as it is.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{type(model).__name__} in {model.dtype} does not run: {reason}") from None
