"""What a token costs on a model: floating-point operations and bytes of activations.

Everything here is arithmetic on a configuration or on parameter counts; nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The widths of a decoder-only transformer, in elements.

    ``query_width`` is heads times head dimension, ``key_width`` the same of the key/value heads, ``intermediate`` the
    width of the MLP.
    """

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Any) -> ModelShape | None:
        """Read a transformers configuration; None where it lacks one of the sizes, and for mixtures of experts.

        A mixture's tokens visit few of its experts, so its parameter count and MLP width say nothing about a token.
        """
        config = config.get_text_config()
        if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
            return None
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        layers, vocabulary = getattr(config, "num_hidden_layers", None), getattr(config, "vocab_size", None)
        if not (hidden and heads and layers and vocabulary):
            return None
        head_width = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
            query_width=heads * head_width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
            vocabulary=vocabulary,
        )

    def attention_flops(self, squared_lengths: int) -> int:
        """Floating-point operations of causal attention, forward and backward.

        ``squared_lengths`` is the sum over segments of length². A layer's scores and its weighted sum take
        ``2 * length² * query_width`` each, causality halves both, and the backward pass costs twice the forward one:
        6 * layers * query_width * length². A sliding window shorter than a segment would cost less.
        """
        return 6 * self.layers * self.query_width * squared_lengths

    def activation_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Estimate of what one forward pass over ``tokens`` keeps for the backward pass, without the logits.

        Per token and layer, in elements: the inputs and outputs of two norms (4 hidden), queries and the attention's
        output (2 query_width), keys and values (2 key_width), and of a gated MLP the gate, its activation, the other
        branch and the product (4 intermediate). Attention is taken to be fused, so no matrix of length² is kept.
        Not counted: float32 copies inside norms, dropout masks, adapters, weights, gradients, optimizer states. With
        gradient checkpointing it is far less: hidden elements per token and layer, and one layer's share of the above.
        """
        per_layer = 4 * self.hidden + 2 * self.query_width + 2 * self.key_width + 4 * self.intermediate
        return tokens * self.layers * per_layer * element_bytes

    def cache_bytes(self, tokens: float, element_bytes: float) -> float:
        """Keys and values of so many tokens, kept while an answer is written."""
        return 2 * self.layers * self.key_width * tokens * element_bytes

    def logit_bytes(self, positions: int) -> int:
        """Estimate of the logits of ``positions`` tokens in float32 and their gradient, where logits are formed."""
        return positions * self.vocabulary * 2 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Weights that every token is multiplied by. The table of input embeddings is looked up, not multiplied by.

    The LM head stands apart, since only supervised tokens need it; tied embeddings count as the head.
    """

    trained: int
    frozen: int
    head_trained: int
    head_frozen: int

    @classmethod
    def of(cls, model: Any) -> ParameterCounts:
        """Count a model's parameters; also quantised ones, and those that DeepSpeed has sharded away."""
        head = {id(weight) for weight in _weights(model, "get_output_embeddings")}
        lookup = {id(weight) for weight in _weights(model, "get_input_embeddings")} - head
        counts = dict.fromkeys(((True, True), (True, False), (False, True), (False, False)), 0)
        for weight in model.parameters():
            if id(weight) not in lookup:
                counts[id(weight) in head, bool(weight.requires_grad)] += _elements(weight)
        return cls(
            trained=counts[False, True],
            frozen=counts[False, False],
            head_trained=counts[True, True],
            head_frozen=counts[True, False],
        )

    def flops(self, tokens: int, supervised: int) -> int:
        """Floating-point operations of forward and backward pass, attention's products of activations left out.

        The familiar 6 * N * tokens, refined in two places: 2 forward, 2 for the gradient of the input, and 2 for that
        of the weight only where the weight is trained (LoRA's base weights are not); and the head's share of N only
        for ``supervised`` tokens, the only ones whose logits the loss needs.
        """
        trunk = (6 * self.trained + 4 * self.frozen) * tokens
        return trunk + (6 * self.head_trained + 4 * self.head_frozen) * supervised

    def recomputed_flops(self, tokens: int) -> int:
        """What gradient checkpointing computes again: one forward pass of the layers; a third of 6 * N * tokens."""
        return 2 * (self.trained + self.frozen) * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the arithmetic needs to know of a causal model.

    ``trunk``, ``head`` and ``lookup`` count parameters: what every token is multiplied by, the LM head, and a table of
    input embeddings that is not also the head. ``layers``: (name, inputs, outputs) of every linear layer of the trunk.
    ``source`` says where this is known from.
    """

    shape: ModelShape
    trunk: int
    head: int
    lookup: int
    layers: tuple[tuple[str, int, int], ...]
    source: str

    @classmethod
    def of(cls, model: Any, source: str) -> ModelFacts | None:
        """Count a model without adapters; None where its configuration does not give its shape."""
        import torch

        shape = ModelShape.from_config(model.config)
        if shape is None:
            return None
        counts, head = ParameterCounts.of(model), getattr(model, "get_output_embeddings", lambda: None)()
        trunk, of_head = counts.trained + counts.frozen, counts.head_trained + counts.head_frozen
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        return cls(
            shape=shape,
            trunk=trunk,
            head=of_head,
            lookup=sum(map(_elements, model.parameters())) - trunk - of_head,
            layers=tuple((name, layer.in_features, layer.out_features) for name, layer in linear if layer is not head),
            source=source,
        )

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trunk + self.head + self.lookup

    def adapter_parameters(self, rank: int, targets: str) -> int:
        """Of LoRA adapters on the layers of these names: ``rank * (inputs + outputs)`` each."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self._adapted(targets))

    def adapted_inputs(self, targets: str) -> int:
        """Widths of the inputs of all layers with adapters, added up."""
        return sum(inputs for inputs, _ in self._adapted(targets))

    def _adapted(self, targets: str) -> list[tuple[int, int]]:
        names = {name.strip() for name in targets.split(",")}
        every = names == {"all-linear"}
        return [(i, o) for name, i, o in self.layers if every or name.rpartition(".")[2] in names]

    def forward_flops(self, tokens: float, squared_lengths: float, head_tokens: float) -> float:
        """Of a forward pass: 2 a parameter and token, the head's only for the tokens whose logits are wanted."""
        attention = self.shape.attention_flops(int(squared_lengths)) / 3  # that counts forward and backward
        return 2 * self.trunk * tokens + 2 * self.head * head_tokens + attention


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, by what holds them."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(self.parts.values())

    def largest(self) -> str:
        """What takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


def inference_memory(model: ModelFacts, weight_bytes: float, tokens: int, base: float, cache_tokens: int = 0) -> Memory:
    """Estimate the peak of a forward pass over ``tokens``, with keys and values of ``cache_tokens`` kept."""
    a_layer = model.shape.activation_bytes(tokens, int(weight_bytes)) / model.shape.layers
    parts = {"the process": base, "weights": model.parameters * weight_bytes, "activations": a_layer}
    cache = {"keys and values": model.shape.cache_bytes(cache_tokens, weight_bytes)} if cache_tokens else {}
    return Memory({**parts, **cache})


def decoding_seconds(
    model: ModelFacts, weight_bytes: float, steps: float, rows: int, length: float, flops: float, bandwidth: float
) -> float:
    """Time of ``steps`` tokens for each of ``rows`` answers at once: every step reads all weights and the cache.

    ``length``: tokens of a row on average while it grows; ``flops`` and ``bandwidth``: what the device reaches of each.
    """
    reading = (model.parameters * weight_bytes + model.shape.cache_bytes(length * rows, weight_bytes)) / bandwidth
    computing = 2 * (model.trunk + model.head) * rows / flops
    return steps * max(reading, computing)


def _weights(model: Any, getter: str) -> list[Any]:
    module = getattr(model, getter, lambda: None)()
    return [] if module is None else list(module.parameters())


def _elements(weight: Any) -> int:
    elements = int(getattr(weight, "ds_numel", None) or weight.numel())  # ZeRO-3 leaves an empty tensor behind
    if type(weight).__name__ == "Params4bit":  # two 4-bit weights in every byte of the storage
        elements *= 2 * int(weight.element_size())
    return elements
