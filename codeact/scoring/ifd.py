"""Instruction-Following Difficulty: how much a question helps a model to predict its answer.

IFD = perplexity(answer | question) / perplexity(answer), as in Li et al., "Superfiltering", arXiv 2402.00530; the code
of their "From Quantity to Quality" (arXiv 2308.12032) divides mean losses, which orders differently. Near 0 the
question says all; at 1 it is no help. CodeACT (arXiv 2408.02193) keeps the rows that are hard, but below 1.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from codeact.base.devices import default_tokens_per_pack, to_device
from codeact.base.errors import InputError, addressed
from codeact.base.protocols import resolve_protocol, resolve_turns
from codeact.data.records import BadRow, Record, open_rows
from codeact.models.isolation import (
    PassRule,
    computing,
    may_share_prefixes,
    packing_attention,
    plain_attention,
    prove_isolation,
    shares_prefixes,
    split_head,
)
from codeact.models.loading import model_and_tokenizer, positions_of
from codeact.ops.attention import PackedBatch
from codeact.ops.nll import nll_backend, token_nll, triton_lacks
from codeact.packing.packs import pack
from codeact.packing.prefixes import SharedPrefixes, pieces, shared_prefixes
from codeact.scoring.table import SCHEMA, TURN_SCHEMA
from codeact.scoring.tokens import TokenizedRecord, answers_of, passes, tokenize
from codeact.text.templates import PromptBuilder

logger = logging.getLogger(__name__)

_Spans = Sequence[tuple[int, int]]
"""Which tokens of a sequence are scored: those of every answer from its start to its stop."""
_RIVALS = 64  # rows of a product that looks for the likeliest token: the logits that are ever held
MAX_LENGTH = 2048
"""Tokens of a sequence, where nothing is said and the model takes so many."""


def default_max_length(config: Any) -> int:
    """Tokens of a sequence where nothing is said, for a model of this configuration; None: it is not here."""
    return min(MAX_LENGTH, (config and positions_of(config)) or MAX_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCost:
    """What scoring took: sequences and tokens through the model, the packs that held them and their capacity.

    ``apart_tokens``: what it would have been with every answer of a conversation in a pass of its own.
    ``shared_tokens``: those that more sequences would have been, had beginnings that they share not been computed once.
    """

    sequences: int
    tokens: int
    packs: int
    capacity_tokens: int
    apart_tokens: int = 0
    shared_tokens: int = 0


class IfdScorer:
    """Scores records with one causal model.

    Args:
        model: a causal transformers model; while it scores, it has an attention that keeps the samples of a pack apart.
        tokenizer: its tokenizer.
        template: a name in ``codeact.text.templates`` (TEMPLATES, CHAT_FORMATS), "chat", or text with ``{question}``.
        max_length: tokens of a sequence at most, BOS included; None: 2,048, or as many as the model has positions.
        tokens_per_pack: tokens of one forward pass; None: ``default_tokens_per_pack``. A longer sequence has a pack of
            its own; with 1 every sequence has, and any causal model can be scored. Where packs of so many do not fit in
            the device's memory, the attribute of this name is halved and scoring goes on.
        attention: an implementation of transformers, or "auto" for the best one for packs that is here.
        protocol: "exact", or "paper" for the numbers of the paper's reference script.
        turns: "all": every answer of a conversation that is to be learnt, given all before it; "last": the last one.
            None: all, but the last under protocol paper.

    Raises:
        InputError: a setting is unknown or does not fit the model, or the model cannot be packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        template: str = "qa",
        max_length: int | None = None,
        tokens_per_pack: int | None = None,
        protocol: str = "exact",
        attention: str = "auto",
        turns: str | None = None,
    ) -> None:
        self.protocol = resolve_protocol(protocol)
        self.turns = resolve_turns(turns, self.protocol)
        if self.protocol == "paper" and template != "qa":
            raise InputError(f"protocol paper scores the template qa only, not {template!r}")
        self.device = model.get_input_embeddings().weight.device
        self.tokens_per_pack = tokens_per_pack or default_tokens_per_pack(self.device, model.num_parameters())
        limit = positions_of(model.config)
        if max_length is None:
            max_length = default_max_length(model.config)
            if max_length < MAX_LENGTH:
                logger.info("sequences of at most %s tokens: the model has no more positions", f"{max_length:,}")
        if max_length < 2 or (limit is not None and max_length > limit):
            raise InputError(
                f"--max-length is {max_length}; this model takes 2 to {limit or 'any number of'} tokens; lower it"
            )
        if self.tokens_per_pack < 1:
            raise InputError(f"--tokens-per-pack is {tokens_per_pack}; it must be at least 1")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompts = PromptBuilder(tokenizer, template)
        self.model = model
        alone = self.tokens_per_pack == 1
        self.rule = PassRule(shared=1) if alone else PassRule.of(model)
        if attention == "auto":
            attention = plain_attention(model) if alone else packing_attention(model, self.device)
        self.attention = attention
        remedy = "" if alone else "say --tokens-per-pack 1: every sequence gets a pass of its own"
        prove_isolation(model, attention, max_length, self.rule, remedy, self.tokens_per_pack)
        self.trunk, self.head = split_head(model)
        self._kept: list[torch.Tensor] | None = None  # the losses of every pack's tokens, while they are asked for
        self._greedy: list[torch.Tensor] | None = None  # whether a span's tokens are the likeliest; the same
        self._order = np.empty(0, np.int64)  # in which spans were run, pack after pack
        self.vocabulary = min(len(self.head.weight), len(model.get_input_embeddings().weight))
        self._halved = False
        self._shares: dict[bool, bool] = {}  # whether a beginning may be computed once; True: and no bit changes

    @property
    def route(self) -> str:
        """What computes the scores: device, attention and backend of the NLL; another one rounds in another way."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {self.attention}, {nll_backend(self.head.weight)}"

    def score(
        self,
        rows: Sequence[Record | BadRow],
        progress: Callable[[float, int], object] | None = None,
        losses: list[np.ndarray] | None = None,
        turns: list[pa.Table] | None = None,
    ) -> tuple[pa.Table, ScoreCost]:
        """Score rows; the table has one row for each of them, in order.

        Args:
            rows: records, and the rows that hold none.
            progress: called after every forward pass with the share of all tokens done so far and the pass's tokens.
            losses: if given, it gets of every scored answer an array (2, scored tokens) float16, nats: the losses of
                its tokens with the question and without it.
            turns: if given, and ``turns`` of the scorer is "all", it gets a table of ``TURN_SCHEMA``: a row for every
                answer of the records.
        """
        tokenized = self._tokenize(rows)
        plan = passes(answers_of(tokenized))
        self._kept = None if losses is None else []
        with computing(self.model, self.attention):
            sums, cost = self._nll_sums(plan.sequences, plan.spans, progress)
        counts = plan.lengths()
        if losses is not None and self._kept:
            pieces = np.split(torch.cat(self._kept).cpu().numpy(), np.cumsum(counts[self._order])[:-1])
            by_span = [pieces[place] for place in np.argsort(self._order)]
            losses += [np.stack([by_span[place] for place in pair]) for pair in plan.places]
        sums, counts = sums[plan.places], counts[plan.places]
        if turns is not None and self.turns == "all":
            owners = [row for row, item in zip(rows, tokenized, strict=True) for _ in item.turns]
            answers = [turn for item in tokenized for turn in item.turns]
            turns.append(self._table(owners, answers, sums, counts, TURN_SCHEMA))
        ok = [index for index, item in enumerate(tokenized) if item.status == "ok"]
        table = self._table(rows, tokenized, _by_row(tokenized, sums)[ok], _by_row(tokenized, counts)[ok], SCHEMA)
        return table, replace(cost, apart_tokens=plan.apart)

    def _tokenize(self, rows: Sequence[Record | BadRow]) -> list[TokenizedRecord]:
        limits = (self.max_length, self.protocol, self.vocabulary, self.turns)
        return tokenize(rows, self.tokenizer, self.prompts, *limits)

    def answer_losses(self, rows: Sequence[Record | BadRow]) -> tuple[np.ndarray, np.ndarray]:
        """NLL of every row's answers given all before, (rows,) float64, nats, and of how many tokens, (rows,) int64.

        As ``score`` has them, for half the work; both are 0 where a row cannot be scored.
        """
        tokenized = self._tokenize(rows)
        plan = passes(answers_of(tokenized), alone=False)
        with computing(self.model, self.attention):
            sums, _ = self._nll_sums(plan.sequences, plan.spans, None)
        losses, tokens = (_by_row(tokenized, values) for values in (sums, plan.lengths()))
        there = np.isfinite(losses)
        return np.where(there, losses, 0.0), np.where(there, tokens, 0)

    @torch.inference_mode()
    def likelihoods(
        self, sequences: list[Sequence[int]], starts: list[int]
    ) -> tuple[np.ndarray, np.ndarray, ScoreCost]:
        """Of ``sequence[start:]`` of every sequence the NLL, and whether each token is the likeliest.

        Args:
            sequences: token ids, at most ``max_length`` + 1: the last one is not given to the model.
            starts: of each, at least 1 and below its length.

        Returns:
            (sequences,) float64, nats, and bool; and what it took.
        """
        self._greedy = []
        try:
            spans = [[(start, len(sequence))] for sequence, start in zip(sequences, starts, strict=True)]
            sums, cost = self._nll_sums(sequences, spans, None)
            greedy = np.ones(len(sequences), np.bool_)
            if self._greedy:
                greedy[self._order] = torch.cat(self._greedy).cpu().numpy()
        finally:
            self._greedy = None
        return sums, greedy, cost

    def _nll_sums(
        self, sequences: list[Sequence[int]], spans: Sequence[_Spans], progress: Callable[[float, int], object] | None
    ) -> tuple[np.ndarray, ScoreCost]:
        """Return the NLL of ``sequence[start:stop]`` in nats for every span of every sequence, summed in float64."""
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences)) - (self._greedy is not None)
        if not len(lengths):
            return np.empty(0), ScoreCost(sequences=0, tokens=0, packs=0, capacity_tokens=0)
        shared = self._shared(sequences, spans, lengths)
        waiting = deque(self._plan(lengths, shared))
        total, done, run, capacity = int(lengths.sum()), 0, 0, 0
        packs: list[np.ndarray] = []
        parts: list[torch.Tensor] = []
        while waiting:
            indices = waiting.popleft()
            members, whole = indices.tolist(), int(lengths[indices].sum())
            group, depth = shared.group[indices], shared.depth[indices]
            _, firsts = np.unique(group, return_index=True)
            tokens = whole - int(depth.sum()) + int(depth[firsts].sum())
            beginnings = (group.tolist(), depth.tolist()) if depth.any() else None
            part = self._pack_sums([sequences[i] for i in members], [spans[i] for i in members], beginnings)
            if part is None:  # from here on packs of half the size, in this call and those after it
                self.tokens_per_pack = min(self.tokens_per_pack, tokens) // 2
                rest = np.concatenate([indices, *waiting])
                waiting = deque(rest[some] for some in self._plan(lengths[rest], SharedPrefixes.none(len(rest))))
                shared = SharedPrefixes.none(len(lengths))
                continue
            packs.append(indices)
            parts.append(part)
            done += whole
            run += tokens
            capacity += max(self.tokens_per_pack, tokens)
            if progress is not None:
                progress(done / total, tokens)
        bounds = np.cumsum([0, *map(len, spans)])
        sums = np.empty(bounds[-1])
        # One transfer at the end: a transfer per pack would make a GPU wait for each.
        self._order = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in np.concatenate(packs)])
        sums[self._order] = torch.cat(parts).cpu().numpy()
        cost = ScoreCost(
            sequences=len(sequences), tokens=run, packs=len(packs), capacity_tokens=capacity, shared_tokens=total - run
        )
        return sums, cost

    def _shared(self, sequences: list[Sequence[int]], spans: Sequence[_Spans], lengths: np.ndarray) -> SharedPrefixes:
        """The beginnings to compute once: up to where the first scored token is predicted, and where it is exact."""
        none, bits = SharedPrefixes.none(len(sequences)), self._greedy is not None
        most = self.tokens_per_pack
        if bits not in self._shares and not may_share_prefixes(self.model, self.attention, self.rule, most, bits):
            self._shares[bits] = False
        if not self._shares.get(bits, True):
            return none
        fits = (lengths <= most).tolist()
        heads = [s[: own[0][0] - 1] if fit else () for s, own, fit in zip(sequences, spans, fits, strict=True)]
        shared = shared_prefixes(heads, lengths.tolist(), most)
        if bits not in self._shares and shared.depth.any():
            longest = min(self.max_length, most)
            self._shares[bits] = shares_prefixes(self.model, self.attention, self.rule, longest, bits)
        return shared if self._shares.get(bits) else none

    def _plan(self, lengths: np.ndarray, shared: SharedPrefixes) -> list[np.ndarray]:
        """Return the members of each pack, the largest first: what does not fit in memory fails at once."""
        if shared.depth.any():
            items, sizes = shared.items(lengths, self.tokens_per_pack)
            plan = self._plan(sizes, SharedPrefixes.none(len(items)))
            return [np.concatenate([items[item] for item in members]) for members in plan]
        packs = []
        keys = self.rule.keys(lengths)
        for key in np.unique(keys)[::-1]:
            members = np.flatnonzero(keys == key)
            capacity = self.rule.capacity(int(lengths[members].max()), self.tokens_per_pack)
            longer = members[lengths[members] > capacity]
            rest = members[lengths[members] <= capacity]
            packs += [np.array([index]) for index in longer[np.argsort(-lengths[longer], kind="stable")]]
            packs += [rest[indices] for indices in pack(lengths[rest], capacity)]
        return packs

    def _pack_sums(
        self,
        samples: list[Sequence[int]],
        spans: Sequence[_Spans],
        beginnings: tuple[list[int], list[int]] | None = None,
    ) -> torch.Tensor | None:
        """Run one pack; float64 (spans,) on the model's device, or None: several samples do not fit in its memory."""
        with suppress(torch.OutOfMemoryError):
            return self._run_pack(samples, spans, beginnings)
        tokens = sum(map(len, samples))
        if len(samples) == 1:
            raise InputError(
                f"a sequence of {tokens:,} tokens does not fit on {self.device}: lower --max-length (now "
                f"{self.max_length:,})"
            )
        torch.cuda.empty_cache()  # a smaller pack does not fit in the pieces that are kept for a larger one
        if not self._halved:
            self._halved = True
            logger.warning(
                "a pack of %s tokens does not fit on %s: packs are halved until they do, and scoring goes on; "
                "%s starts lower",
                f"{tokens:,}",
                self.device,
                addressed("--tokens-per-pack"),
            )
        return None

    @torch.inference_mode()
    def _run_pack(
        self,
        samples: list[Sequence[int]],
        spans: Sequence[_Spans],
        beginnings: tuple[list[int], list[int]] | None = None,
    ) -> torch.Tensor:
        fed = samples if self._greedy is None else [sample[:-1] for sample in samples]
        goes_on: list[int] | None = None
        rests, depth = list(range(len(fed))), [0] * len(fed)
        if beginnings is not None:
            depth = beginnings[1]
            fed, goes_on, rests = pieces(fed, *beginnings)
        if self._greedy is not None:
            fed = self._padded(fed)
        if goes_on is not None:
            goes_on += [-1] * (len(fed) - len(goes_on))
        batch = PackedBatch.from_samples(fed, goes_on)
        offset = (batch.cu_seqlens[rests] - torch.tensor(depth)).tolist()
        # The hidden state before a token predicts it; only those that predict an answer token go through the head.
        placed = [(o, s, *span) for o, s, own in zip(offset, samples, spans, strict=True) for span in own]
        before = [np.arange(o + start, o + stop) - 1 for o, _, start, stop in placed]
        bounds = torch.from_numpy(np.cumsum([0, *map(len, before)], dtype=np.int32))
        scored = np.concatenate([np.asarray(s[start:stop], np.int64) for _, s, start, stop in placed])
        targets = to_device(torch.from_numpy(scored), self.device)
        hidden = self.trunk(**self.rule.inputs(batch, self.device)).last_hidden_state[0]
        hidden = hidden[to_device(torch.from_numpy(np.concatenate(before)), self.device)]
        hidden, bias = self.head.scaled(hidden)
        nll = token_nll(hidden, self.head.weight, targets, bias, self.head.softcap)
        sums = _sums(nll, to_device(bounds, self.device))
        if self._kept is not None:
            self._kept.append(nll.half())
        if self._greedy is not None:
            likeliest = self._likeliest(hidden, bias, targets, nll).float()
            self._greedy.append(torch.segment_reduce(likeliest, "min", lengths=bounds.diff().to(self.device)).bool())
        return sums

    def _padded(self, samples: list[Sequence[int]]) -> list[Sequence[int]]:
        """The samples, and some of their tokens again until the pass has as many tokens as every other one.

        A product of matrices rounds by the number of its rows: so a sample has the same bits whatever else is scored.
        Models whose samples share no pass with shorter ones are left as they are.
        """
        longest = max(samples, key=len)
        space = self.rule.capacity(len(longest), self.tokens_per_pack) - sum(map(len, samples))
        if self.rule.switches or space <= 0:
            return samples
        more = [longest] * (space // len(longest)) + [longest[: space % len(longest)]]
        return [*samples, *(sample for sample in more if len(sample))]

    def _likeliest(
        self, hidden: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, nll: torch.Tensor
    ) -> torch.Tensor:
        """Whether each target is the likeliest token, of equal ones the first; (T,) bool.

        A product of matrices rounds by the number of its rows. So it is of as many always, and names the rival only;
        what decides is the rival's loss, which has the same bits in any batch.
        """
        found = torch.ones_like(targets, dtype=torch.bool)
        weight = self.head.weight
        for rows in torch.split(torch.nonzero(~(nll < 0.69)).squeeze(1), _RIVALS):  # above a half there is no rival
            block = hidden.new_zeros(_RIVALS, hidden.shape[1])
            block[: len(rows)] = hidden[rows]
            logits = (block @ weight.T)[: len(rows)]
            if bias is not None:
                logits = logits + bias
            rivals = logits.scatter(1, targets[rows, None], -torch.inf).argmax(dim=1)
            other = token_nll(hidden[rows], weight, rivals, bias, self.head.softcap)
            found[rows] = (nll[rows] < other) | ((nll[rows] == other) & (targets[rows] < rivals))
        return found

    def _table(
        self,
        rows: Sequence[Record | BadRow],
        items: Sequence[TokenizedRecord],
        sums: np.ndarray,
        counts: np.ndarray,
        schema: pa.Schema,
    ) -> pa.Table:
        """A row for each of ``items``; ``sums`` and ``counts`` are (N, 2), of those N that have the status ok."""
        scored = [index for index, item in enumerate(items) if item.status == "ok"]
        statuses = [item.status for item in items]
        reasons = [item.reason for item in items]
        nll = np.full((len(items), 2), np.nan)
        scored_tokens = np.zeros((len(items), 2), dtype=np.int32)
        nll[scored], scored_tokens[scored] = sums, counts
        means = nll[scored] / counts
        ifd = np.full(len(items), np.nan)
        with np.errstate(over="ignore", invalid="ignore"):
            # The quotient of the perplexities: the reference script divides the two, exact takes one exponential.
            if self.protocol == "paper":
                ifd[scored] = np.exp(means[:, 0]) / np.exp(means[:, 1])
            else:
                ifd[scored] = np.exp(means[:, 0] - means[:, 1])
        for index in scored:
            if not np.isfinite(ifd[index]):
                statuses[index] = "nonfinite"
                where = f"row {rows[index].row}" + ("" if items[index].turn is None else f", turn {items[index].turn}")
                reasons[index] = f"nonfinite: {where}: NLL sums {nll[index, 0]} and {nll[index, 1]}"
                nll[index] = ifd[index] = np.nan
        columns = {
            "id": [row.id for row in rows],
            "row": [row.row for row in rows],
            "turn": [item.turn for item in items],
            "status": statuses,
            "reason": reasons,
            "truncated": [item.truncated for item in items],
            "prompt_tokens": [item.prompt_tokens for item in items],
            "answer_tokens": [item.answer_tokens for item in items],
            "scored_tokens": scored_tokens[:, 0],
            "uncond_scored_tokens": scored_tokens[:, 1],
            # from_pandas: a NaN, which stands for "no number" here, becomes null.
            "cond_nll_sum": pa.array(nll[:, 0], from_pandas=True),
            "uncond_nll_sum": pa.array(nll[:, 1], from_pandas=True),
            "ifd": pa.array(ifd, from_pandas=True),
        }
        return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _by_row(items: Sequence[TokenizedRecord], values: np.ndarray) -> np.ndarray:
    """Add up what belongs to the answers of each row: (answers, ...) -> (rows, ...)."""
    added = np.zeros((len(items), *values.shape[1:]), values.dtype)
    np.add.at(added, [row for row, item in enumerate(items) for _ in answers_of([item])], values)
    return added


def _sums(nll: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Float64 sums of ``nll[bounds[i] : bounds[i + 1]]``; a sum does not depend on what else is in the pack."""
    if nll.device.type == "cuda" and triton_lacks() is None:
        from codeact_kernels.segments import segment_sums

        return segment_sums(nll, bounds)[0]
    return torch.segment_reduce(nll.double(), "sum", lengths=bounds.diff().long(), unsafe=True)


def score_ifd(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: Any = None,
    records: Any = (),
    template: str = "qa",
    max_length: int | None = None,
    tokens_per_pack: int | None = None,
    protocol: str = "exact",
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    turns: str | None = None,
    by_turn: bool = False,
) -> pa.Table:
    """Score records that fit in memory; ``codeact score`` does the same for any number, in shards that survive a kill.

    Args:
        model: a causal transformers model, or the name or folder of one, loaded as ``dtype`` on ``device``.
        tokenizer: its tokenizer; may be None when ``model`` is a name.
        records: what to score: records, or whatever `codeact.data.records.open_records` opens (a path, a list of
            dictionaries, a ``datasets.Dataset``, a table of Arrow, pandas or polars). Rows that hold no record are kept
            with their reason. The ids of the table are the numbers of the rows, also where there is a column "id";
            ``open_records(rows, Columns(id="id"))`` takes them from it.
        template: a name in ``codeact.text.templates`` (TEMPLATES, CHAT_FORMATS), "chat", or text with ``{question}``.
        max_length: tokens of a sequence at most, BOS included; a longer answer is cut at its end and marked. None:
            2,048, or as many as the model has positions.
        tokens_per_pack: tokens of one forward pass; None: as many as keep the device busy. With 1 every sequence has a
            pass of its own, and any causal model can be scored.
        protocol: "exact", or "paper" for the numbers of the paper's reference script.
        dtype: of a model given by name: "auto" is bfloat16 where the hardware has it, else float32.
        device: of a model given by name.
        attention: an implementation of transformers; "auto" is the best one for packs that is here. A loaded model has
            its own again afterwards.
        turns: "all": the answers of a conversation that are to be learnt, each given all before it; "last": the last
            one. None: all, but the last under protocol paper.
        by_turn: a row for every answer, whatever became of it, in place of one for every record.

    Returns:
        A table with the columns of ``codeact.scoring.table.SCHEMA``, one row a record, in order; by turn with those of
        ``TURN_SCHEMA`` there. NLL sums are in nats.

    Raises:
        InputError: a setting is unknown, or the model cannot be loaded or packed.
    """
    if by_turn and resolve_turns(turns, resolve_protocol(protocol)) != "all":
        raise InputError("a row for every answer wants turns all, and not protocol paper")
    call = "score_ifd(model, tokenizer, records)"
    model, tokenizer = model_and_tokenizer(model, tokenizer, dtype, device, call)
    scorer = IfdScorer(model, tokenizer, template, max_length, tokens_per_pack, protocol, attention, turns)
    tables: list[pa.Table] = []
    table, _ = scorer.score(list(open_rows(records)), turns=tables)
    return tables[0] if by_turn else table
