"""No sample sees another, whatever the architecture: every family against its own logits of one sample by itself."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from codeact import _native
from codeact.base.errors import InputError
from codeact.data.records import Record
from codeact.models import isolation
from codeact.models.isolation import (
    PassRule,
    computing,
    few_layers,
    only_layers,
    prove_isolation,
    read_head,
    split_head,
)
from codeact.ops.attention import ATTENTION, PackedBatch
from codeact.scoring.ifd import IfdScorer
from tests.helpers.zoo import (
    LONGEST,
    SWITCH,
    WINDOW,
    known,
    logits_alone,
    make_model,
    nll_alone,
    random_ids,
    share_the_pass,
)

LENGTHS = (4, WINDOW, SWITCH, SWITCH + 1, 9, 90, WINDOW + 1, 70, 5)
PACKED = (
    "llama", "llama dynamic", "phi3 longrope", "llama longrope", "mistral sliding", "gemma2", "gpt_neo", "llama4_text",
    "cohere", "granite", "mixtral", "lfm2", "gpt_oss",
)  # fmt: skip
ALONE = (
    "bloom", "mamba", "jamba", "qwen3_next", "falcon_h1", "granitemoehybrid", "recurrent_gemma", "xlstm",
)  # fmt: skip


SHARED = ("llama", "mistral sliding", "gemma2", "cohere", "granite", "mixtral", "gpt_oss")


def scorer(model, tokenizer, **more) -> IfdScorer:
    return IfdScorer(model, tokenizer, max_length=min(LONGEST, most(model)), **more)


def most(model) -> int:
    return getattr(model.config, "max_position_embeddings", None) or LONGEST


def sums(scorer: IfdScorer, sequences: list[list[int]]) -> np.ndarray:
    with computing(scorer.model, scorer.attention):
        return scorer._nll_sums(sequences, [[(1, len(sequence))] for sequence in sequences], None)[0]


class TestScores:
    @pytest.mark.parametrize("name", PACKED)
    def test_packs_give_what_samples_get_alone(self, name, tokenizer):
        """Lengths on both sides of every switch and window, in packs of more tokens than the model has positions."""
        model = make_model(name)
        sequences = [random_ids(min(length, most(model)), seed) for seed, length in enumerate(LENGTHS)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, tokens_per_pack=200), sequences), expected, rtol=1e-5)

    @pytest.mark.parametrize("name", ALONE)
    def test_what_cannot_be_packed_is_scored_one_by_one(self, name, tokenizer):
        model = make_model(name)
        with pytest.raises(InputError, match=r"cannot be packed with .*say tokens_per_pack 1"):
            scorer(model, tokenizer)
        sequences = [random_ids(length, length) for length in (4, 40, 17)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, tokens_per_pack=1), sequences), expected, rtol=1e-5)

    @pytest.mark.parametrize("name", [name for name in PACKED if known(name)])
    def test_a_beginning_that_is_computed_once(self, name, tokenizer):
        """Longer than a window; where a sample's logits follow from its length it is not tried."""
        model = make_model(name)
        head = random_ids(40, seed=99)
        sequences = [[*head, *random_ids(length, seed=length)] for length in (5, 7, 9, 30, 60)]
        ours = scorer(model, tokenizer)
        with computing(model, ours.attention):
            found, cost = ours._nll_sums(sequences, [[(41, len(ids))] for ids in sequences], None)
        assert cost.shared_tokens == (4 * 40 if name in SHARED or ours._shares.get(False) else 0)
        assert cost.tokens + cost.shared_tokens == sum(map(len, sequences))
        assert found == pytest.approx([nll_alone(model, ids, 41) for ids in sequences], rel=1e-4)

    @pytest.mark.parametrize("leak", ["positions", "prefix"])
    def test_a_model_that_loses_the_beginning_does_not_share_it(self, leak, monkeypatch, tokenizer):
        model = make_model("llama")
        real = PackedBatch.model_inputs

        def inputs(batch, device):
            given = real(batch, device)
            if batch.prefixes is not None and leak == "prefix":
                del given["prefix_samples"]
            elif batch.prefixes is not None:
                given["position_ids"] = PackedBatch.from_samples([[0]] * len(given["input_ids"][0])).position_ids
            return given

        monkeypatch.setattr(PackedBatch, "model_inputs", inputs)
        assert not isolation.shares_prefixes(model, ATTENTION, PassRule.of(model), LONGEST)
        monkeypatch.undo()
        assert isolation.shares_prefixes(model, ATTENTION, PassRule.of(model), LONGEST)

    @pytest.mark.skipif(
        not _native.instruction_sets(), reason="this CPU has no instruction set of the compiled kernels"
    )
    @pytest.mark.parametrize(("name", "bits"), [("llama", True), ("cohere", True), ("mistral sliding", False)])
    def test_where_no_bit_changes(self, name, bits, monkeypatch):
        model = make_model(name)
        given = (model, ATTENTION, PassRule.of(model), LONGEST)
        assert isolation.shares_prefixes(*given, bits=True) == bits
        monkeypatch.setenv("CODEACT_BACKEND", "torch")
        assert not isolation.shares_prefixes(*given, bits=True)
        assert isolation.shares_prefixes(*given)

    def test_another_attention_is_named_where_it_helps(self, tokenizer):
        model = make_model("doge")
        try:
            scorer(model, tokenizer, attention="sdpa")
            remedy = "say attention sdpa, which keeps them apart"
        except InputError:
            remedy = "say tokens_per_pack 1"
        with pytest.raises(InputError, match=remedy):
            scorer(model, tokenizer)
        if "sdpa" not in remedy:
            pytest.skip("the Doge of this transformers leaves its mask out where a pack needs it: nothing helps")
        sequences = [random_ids(length, length) for length in (4, 40, 17)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, attention="sdpa"), sequences), expected, rtol=1e-5)


class TestProof:
    @pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope", "llama longrope", "llama4_text"])
    def test_it_spans_every_length_that_the_configuration_names(self, name):
        """A rule that forgets the switch is found out above it, and is right below."""
        model = make_model(name)
        prove_isolation(model, ATTENTION, LONGEST, PassRule.of(model))
        prove_isolation(model, ATTENTION, WINDOW, PassRule())
        with pytest.raises(InputError, match=r"samples of 5/9/.*3[34]/3[45] tokens get other logits than alone"):
            prove_isolation(model, ATTENTION, LONGEST, PassRule())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("name", "fits"), [("llama", True), ("lfm2", True), ("falcon_h1", False), ("mamba", False)]
    )
    def test_16_bits_hide_no_leak(self, name, fits, dtype):
        """Falcon-H1 carries 2 % of a logit into the next sample: less than what two attentions round."""
        leak = pytest.raises(InputError, match="samples of 5/9/7 tokens get other logits than alone")
        with nullcontext() if fits else leak:
            prove_isolation(make_model(name, dtype), ATTENTION, LONGEST)

    def test_an_attention_that_forgets_a_window_is_refused(self, monkeypatch):
        from codeact.ops import attention

        plain = attention._sample_attention
        monkeypatch.setattr(attention, "_sample_attention", lambda *a: plain(*a[:5], None, *a[6:]))
        with pytest.raises(InputError, match="get other logits than with sdpa"):
            prove_isolation(make_model("mistral sliding"), ATTENTION, LONGEST)

    @pytest.mark.parametrize("room", [0, 60, 150])  # a floor under which nothing shows, longer than any short sample
    @pytest.mark.parametrize("how", ["capacity", "statistics", "mean"])
    def test_what_the_tokens_of_a_pass_share_is_found_out(self, how, room, tokenizer):
        """And such a model is scored one by one."""
        model = share_the_pass(make_model("llama"), how, room)
        with pytest.raises(InputError, match=r"get other logits than alone .*say tokens_per_pack 1"):
            scorer(model, tokenizer, tokens_per_pack=200)
        sequences = [random_ids(length, length) for length in (4, 90, 17)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, tokens_per_pack=1), sequences), expected, rtol=1e-5)

    def test_a_floor_that_no_pass_reaches_is_no_leak(self, tokenizer):
        model = share_the_pass(make_model("llama"), "capacity", 200)
        sequences = [random_ids(length, length) for length in (4, 90, 17, 80)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, tokens_per_pack=200), sequences), expected, rtol=1e-5)

    def test_activations_that_are_quantized_by_the_pass(self, tokenizer):
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(make_model("llama"), {torch.nn.Linear}, torch.qint8)
        model.lm_head = make_model("llama").lm_head
        with pytest.raises(InputError, match="get other logits than alone"):
            scorer(model, tokenizer)

    @pytest.mark.skipif(not known("minimax_m3_vl_text"), reason="this transformers has no MiniMax M3")
    def test_keys_that_are_chosen_by_blocks_are_not_forgotten(self, tokenizer):
        """Attention for packs has no block_indices; no short sample has so many blocks that it matters."""
        model = make_model("minimax_m3_vl_text")
        with pytest.raises(InputError, match=r"does not compute block_indices.*say tokens_per_pack 1"):
            scorer(model, tokenizer)
        sequences = [random_ids(length, length) for length in (4, 120, 17)]
        expected = [nll_alone(model, ids, 1) for ids in sequences]
        np.testing.assert_allclose(sums(scorer(model, tokenizer, tokens_per_pack=1), sequences), expected, rtol=1e-5)

    @pytest.mark.skipif(not known("deepseek_v32"), reason="this transformers has no DeepSeek 3.2")
    @pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
    def test_keys_that_are_chosen_among_all_of_the_pass(self, attention, tokenizer):
        with pytest.raises(InputError, match="say tokens_per_pack 1"):
            scorer(make_model("deepseek_v32"), tokenizer, attention=attention)

    def test_a_few_layers_have_one_of_every_kind(self):
        """Experts may begin after some layers without, which the names of the kinds of attention do not tell."""
        model = make_model("llama")
        assert few_layers(model) == 2
        layers = model.model.layers
        model.config.num_hidden_layers = 6
        for number in range(4):
            layers.append(copy.deepcopy(layers[0]))
            layers[-1].mlp = torch.nn.ModuleList([layers[-1].mlp]) if number > 1 else layers[-1].mlp
        assert few_layers(model) == 5
        with only_layers(model, 5):
            assert (len(model.model.layers), model.config.num_hidden_layers) == (5, 5)
        assert (len(model.model.layers), model.config.num_hidden_layers) == (6, 6)

    def test_a_pass_that_does_not_fit_is_halved(self, monkeypatch):
        """As whoever packs does; a leak that a smaller one shows is found all the same."""
        fits, seen = 300, []
        plain = isolation._logits

        def logits(model, samples, *rule):
            seen.append(sum(map(len, samples)))
            if seen[-1] > fits:
                raise torch.OutOfMemoryError
            return plain(model, samples, *rule)

        monkeypatch.setattr(isolation, "_logits", logits)
        prove_isolation(make_model("llama"), ATTENTION, LONGEST, tokens=1000)
        assert max(seen) > fits
        assert max(tokens for tokens in seen if tokens <= fits) > LONGEST
        with pytest.raises(InputError, match="other logits than alone"):
            prove_isolation(share_the_pass(make_model("llama"), "capacity", 150), ATTENTION, LONGEST, tokens=1000)
        fits = 100  # not even a sample: whoever packs will say so
        prove_isolation(make_model("llama"), ATTENTION, LONGEST, tokens=1000)

    def test_an_attention_that_is_none(self, tokenizer):
        with pytest.raises(InputError, match=r"cannot be packed with flesh: .*say attention sdpa"):
            scorer(make_model("llama"), tokenizer, attention="flesh")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_is_left_as_it_came(attention, training, tokenizer):
    """Its attention and its mode, after scoring, after a refusal, and when scoring fails; and it can be trained on."""
    model = make_model("phi3 longrope").train(training)
    model.set_attn_implementation(attention)
    ours = scorer(model, tokenizer, template="{question}")
    sums(ours, [random_ids(9, 0)])
    with pytest.raises(ZeroDivisionError):
        ours.score([Record(id="0", row=0, question="1", answer="234")], lambda *_: 1 // 0)
    with pytest.raises(InputError):
        scorer(model, tokenizer, attention="flesh")
    assert (model.config._attn_implementation, model.training) == (attention, training)
    model(torch.tensor([random_ids(60, 0)]), labels=torch.tensor([random_ids(60, 0)])).loss.backward()


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2", "recurrent_gemma", "xlstm", "llama4_text"])
def test_the_head_has_its_scale_and_its_softcap(name):
    model = make_model(name)
    trunk, head = split_head(model)
    ids = random_ids(12, 0)
    with torch.inference_mode():
        ours = head.logits(trunk(torch.tensor([ids]), use_cache=False).last_hidden_state[0])
    torch.testing.assert_close(ours.double(), logits_alone(model, ids), rtol=1e-4, atol=1e-4)
    assert (read_head(model).scale, read_head(model).softcap) != (1.0, None) or name == "llama4_text"
