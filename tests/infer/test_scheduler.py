"""Continuous batching and drafts: a request generates what it would generate alone and without drafts."""

import random

import pytest
import torch
import torch.nn.functional as F
from silent import Silent

from moonwhale.errors import UserError
from moonwhale.infer import sampling, scheduler
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.request import Request
from moonwhale.infer.sampling import Noise
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.infer.scheduler import Scheduler

MOBA = {"moba_block_size": 4, "moba_topk": 2, "num_nextn_predict_layers": 2, "mtp_num_blocks": [1, 2]}
V = 61


def tokens(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(prompt, tokens=20, seed=0, vocabulary=V, **options):
    options = SamplingOptions(**{"temperature": 0.0, "min_p": 0.0, "max_new_tokens": tokens} | options)
    noise = Noise(seed, vocabulary, torch.device("cpu"))
    return Request(prompt, options, {}, Silent(), noise, tokens)


def scheduler_of(model, draft=0, memory=10**8, sequences=8):
    return Scheduler(Decoder(model), memory, sequences, Drafting(len(model.model.mtp_modules), draft))


def unfinished(requests):
    return any(one.finish_reason is None for one in requests)


def run(to, requests):
    for one in requests:
        to.submit(one)
    while unfinished(requests):
        to.step()
    return [one.token_ids for one in requests]


def mixed(**options):
    return [request(tokens(n, seed=n), tokens=m, seed=n, **options) for n, m in ((1, 30), (9, 12), (40, 8), (70, 20))]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(max_position_embeddings=256, **MOBA)


@pytest.fixture(scope="module")
def certain(tiny_model):
    """Returns a model with uniform predictions, so that every draft is accepted."""
    model = tiny_model(max_position_embeddings=256, **MOBA)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def assert_greedy(draft, model):
    for one, got in zip(mixed(), run(scheduler_of(model, draft), mixed()), strict=True):
        ids = torch.tensor([one.prompt])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=one.limit, do_sample=False)
        assert got == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("draft", [0, 1, 2])
def test_greedy_decoding_equals_transformers_with_and_without_drafts(draft, model):
    assert_greedy(draft, model)


SAMPLED = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02}, {"temperature": 1.2, "top_k": 9}]


@pytest.mark.parametrize("options", [*SAMPLED, {"temperature": 1.0, "repetition_penalty": 1.3}])
def test_drafts_change_no_sample(options, model):
    without, *others = (run(scheduler_of(model, draft), mixed(**options)) for draft in (0, 1, 2))
    assert all(other == without for other in others)


def test_other_requests_in_the_batch_change_nothing(model):
    options = {"temperature": 1.0}
    together = run(scheduler_of(model, 2), mixed(**options))
    in_turns = run(scheduler_of(model, 2, sequences=1), mixed(**options))
    alone = [run(scheduler_of(model, 0), [one])[0] for one in mixed(**options)]
    assert together == in_turns == alone


def test_requests_come_and_go_at_any_step(model):
    to, all_of_them = scheduler_of(model, 1, sequences=2), mixed(temperature=1.0) + mixed()
    for one in all_of_them:
        to.submit(one)
        to.step()
        to.step()
    while unfinished(all_of_them):
        to.step()
        assert len(to.running) <= 2
    assert [one.token_ids for one in all_of_them] == run(scheduler_of(model), mixed(temperature=1.0) + mixed())


def test_long_prompts_are_prefilled_in_pieces_while_others_continue(tiny_model):
    model = tiny_model(max_position_embeddings=2048, **MOBA)
    to, short, long = scheduler_of(model, 2), request(tokens(5), tokens=30), request(tokens(1000), tokens=5)
    to.submit(short)
    to.step()
    to.submit(long)
    while to.prefilling or to.waiting:
        before = len(short.token_ids)
        to.step()
        assert len(short.token_ids) > before
    while unfinished([short, long]):
        to.step()
    for one, draft in ((short, 0), (long, 0)):
        assert run(scheduler_of(model, draft), [request(one.prompt, tokens=one.limit)])[0] == one.token_ids


def test_accepted_drafts_save_forwards(certain):
    for options in ({}, {"temperature": 1.0}):
        (one,) = (ones := [request(tokens(5), tokens=31, **options)])
        run(scheduler_of(certain, 2), ones)
        assert one.forwards == 11  # the prompt's forward gives one token, each of the others three
        assert one.drafted == one.accepted == [10, 10]


def test_drafts_behind_the_end_of_an_answer_do_not_count(certain):
    """The answer's 29th token is the first draft of its step, and ends it."""
    (one,) = (ones := [request(tokens(5), tokens=29)])
    run(scheduler_of(certain, 2), ones)
    assert one.drafted == one.accepted == [10, 9]


def test_the_modules_see_the_first_prompt(certain):
    """A trial begins with the deepest drafts."""
    to = Scheduler(Decoder(certain), 10**8, 8, Drafting(2))
    to.submit(request(tokens(20), tokens=9))
    to.step()
    for layer in range(certain.config.num_hidden_layers, len(to.cache.keys)):
        assert (to.cache.keys[layer][0, :19] != 0).any(-1).all()


def several(**options):
    return [request(tokens(n, seed=n), tokens=m, seed=n, **options) for n, m in ((1, 14), (9, 10), (21, 12))]


def assert_modules_read_what_is_verified(to, decoder):
    """Compare the MTP modules' caches of all running sequences with those of a `decoder` that reads each text at once.

    Module k reads token i + k at position i. Its last k - 1 entries come from drafts and are not compared.
    """
    for slot, row in enumerate(to.running):
        ids, n = torch.tensor([row.ids]), row.cached
        assert ids.shape[1] == n + 1
        cache = decoder.cache()
        cache.resize(1, n)
        placement = decoder.place(cache, 0, [0], n)
        hidden, first = decoder.run(ids[:, :n], cache, placement), decoder.config.num_hidden_layers
        for k, blocks in enumerate(decoder.config.mtp_blocks, start=1):
            hidden = decoder.draft(k, hidden, F.pad(ids, (0, k))[:, k : n + k], cache, placement)
            final = max(n + 1 - k, 0)
            for layer in range(first, first + blocks):
                lengths = final, final, final // decoder.block_size  # of keys, values and means
                for got, want, length in zip(to.cache.of_layer(layer), cache.of_layer(layer), lengths, strict=True):
                    torch.testing.assert_close(got[slot, :length], want[0, :length], atol=5e-5, rtol=1e-4)
            first += blocks


def run_and_compare_modules(to, decoder, requests):
    for one in requests:
        to.submit(one)
    while unfinished(requests):
        to.step()
        assert_modules_read_what_is_verified(to, decoder)
    assert sum(sum(one.accepted) for one in requests) < sum(sum(one.drafted) for one in requests)


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("modules", [2, 3])
@torch.inference_mode()
def test_a_rejected_draft_leaves_no_trace_in_the_modules(modules, options, sequences, tiny_model, monkeypatch):
    """Prompts are prefilled in pieces of 8 tokens, so that one has a last piece of a single token."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 8)
    shape = MOBA | {"num_nextn_predict_layers": modules, "mtp_num_blocks": [1, 2, 1][:modules]}
    model, ones = tiny_model(max_position_embeddings=256, **shape), several(**options)
    run_and_compare_modules(scheduler_of(model, modules, sequences=sequences), Decoder(model), ones)
    assert not options or any(sum(one.accepted) for one in ones)


def test_a_moved_sequence_leaves_nothing_of_an_earlier_one(certain):
    cache = Decoder(certain).cache()
    cache.resize(2, 4 * cache.config.moba_block_size)
    first = cache.config.num_hidden_layers
    for tensor in (*cache.keys[first:], *cache.means[first:]):
        if tensor is not None:
            tensor.fill_(50.0)
    cache.clear(1)
    cache.move(1, 0, 4)
    for tensor in (*cache.keys[first:], *cache.means[first:]):
        assert tensor is None or not tensor.any()


def test_cancelling_frees_a_slot(model):
    to = scheduler_of(model, 1, sequences=2)
    first, second, third, fourth = ones = [request(tokens(5, seed=i), tokens=200, seed=i) for i in range(4)]
    for one in ones:
        to.submit(one)
    for _ in range(5):
        to.step()
    assert to.running == [first, second] and list(to.waiting) == [third, fourth]
    to.cancel(first)
    to.cancel(third)
    to.step()
    assert to.running == [second, fourth] and not to.waiting
    for one in (second, fourth):
        to.cancel(one)
    to.step()
    assert not (to.running or to.prefilling or to.waiting)
    assert [one.finish_reason for one in ones] == ["cancelled"] * 4


def test_requests_are_admitted_by_memory(model):
    each = scheduler_of(model)._entries(request(tokens(30)))
    room = int(2.5 * each * scheduler_of(model).cache.bytes_per_token)
    to = scheduler_of(model, memory=room)
    ones = [request(tokens(30, seed=i), seed=i) for i in range(4)]
    for one in ones:
        to.submit(one)
    while unfinished(ones):
        to.step()
        assert len(to.running) <= 2 and to.cache.bytes <= room
    assert all(one.finish_reason == "length" for one in ones)
    with pytest.raises(UserError, match="need a cache of"):
        to.submit(request(tokens(100), tokens=150))


def test_the_cache_holds_the_blocks_that_run(model):
    """The model has 2 main blocks, and 1 and 2 blocks in its MTP modules."""
    for draft, blocks in ((0, 2), (1, 3), (2, 5), (None, 5)):
        server = scheduler_of(model, draft)
        run(server, [request(tokens(30))])
        assert len(server.cache.keys) == blocks
        assert server.cache.bytes == server.cache.bytes_per_token * server.cache.slots * server.cache.length


def test_log_probabilities_equal_the_models(model):
    one = request(tokens(6), tokens=4)
    one.top_logprobs = 3
    run(scheduler_of(model, 2), [one])
    logits = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
    for n, (token, (logprob, top)) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
        row = logits[5 + n]
        assert logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert list(top) == row.topk(3).indices.tolist()


# --- the distribution ------------------------------------------------------------------------------------------------


SMALL, DRAWN = 7, 3000


def chi_square(tiny_model, draft) -> float:
    """Return the chi-square of pairs of sampled tokens against the model's own distribution, divided by its degrees of
    freedom. It is about 1 if they agree.
    """
    model = tiny_model(vocab_size=SMALL, num_nextn_predict_layers=2, max_position_embeddings=64)
    to, prompt = scheduler_of(model, draft, sequences=250), [1, 2, 3, 4]
    ones = [request(prompt, tokens=4, seed=i, vocabulary=SMALL, temperature=1.0) for i in range(DRAWN)]
    run(to, ones)
    # The second and the third token can both come from a draft.
    seen = torch.zeros(SMALL, SMALL)
    for one in ones:
        seen[one.token_ids[1], one.token_ids[2]] += 1
    expected = torch.zeros(SMALL, SMALL)
    with torch.inference_mode():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for a in range(SMALL):
            second = model(torch.tensor([[*prompt, a]])).logits[0, -1].softmax(-1)
            for b in range(SMALL):
                third = model(torch.tensor([[*prompt, a, b]])).logits[0, -1].softmax(-1)
                expected[b] += first[a] * second[b] * third
    expected *= DRAWN
    common = expected > 5
    return (((seen - expected) ** 2 / expected)[common].sum() / (common.sum() - 1)).item()


def test_sampling_with_drafts_keeps_the_distribution(tiny_model):
    assert chi_square(tiny_model, draft=2) < 1.6


def test_mutant_drafts_accepted_unchecked(tiny_model, monkeypatch):
    """A plausible bug: drafts are accepted without comparing them with the model's own choice."""
    right = scheduler.choose

    def believing(logits, rows, ahead=0):
        chosen = right(logits, rows, ahead)
        if ahead == 0 and all(row.drafts for row in rows) and logits.shape[-1] == SMALL:
            return [row.drafts[min(row.n_accepted, len(row.drafts) - 1)] for row in rows]
        return chosen

    monkeypatch.setattr(scheduler, "choose", believing)
    assert chi_square(tiny_model, draft=2) > 1.6


def test_mutant_noise_used_twice(tiny_model, monkeypatch):
    """A draw with the previous token's noise depends on that token."""
    right, kept = Noise.of, {}
    monkeypatch.setattr(sampling.Noise, "of", lambda self, n: kept.setdefault(id(self), right(self, n)))
    assert chi_square(tiny_model, draft=2) > 1.6


# --- the depth -------------------------------------------------------------------------------------------------------


def verdicts(accepted, depth):
    """Return the verdicts on `depth` drafts of which the first `accepted` are right: none after the first wrong one."""
    return [k < accepted for k in range(min(accepted + 1, depth))]


def settled(seconds, held, modules=2, cycles=200):
    """Return the depth that is chosen most if cycles take seconds[depth] and `held` of the drafts are accepted."""
    drafting, chosen = Drafting(modules), []
    for _ in range(cycles):
        depth = drafting.depth(1)
        chosen.append(depth)
        drafting.record(depth, seconds[depth], [verdicts(held, depth)])
    return max(set(chosen[cycles // 2 :]), key=chosen.count)


def test_the_draft_depth_is_the_fastest():
    assert settled([1.0, 1.2, 1.4], held=2) == 2
    assert settled([1.0, 1.2, 2.4], held=1) == 1
    assert settled([1.0, 1.2, 1.4], held=0) == 0
    assert settled([1.0, 2.1, 3.2], held=2) == 0
    assert Drafting(2, fixed=1).depth(1) == 1
    assert Drafting(2, fixed=9).depth(1) == 2
    assert Drafting(0).depth(5) == 0
    fixed = Drafting(2, fixed=2)
    for _ in range(100):
        fixed.record(2, 1.0, [[True, False]])
    assert not any(fixed._trials[1].seconds.values()), "with one possible depth nothing is kept"


def simulated(seconds, acceptance, cycles, hiccups=()):
    """Return the depths that are chosen if cycles take seconds[depth], and the tokens per second relative to no drafts.

    In a hiccup the machine takes three times as long.
    """
    generator, drafting = random.Random(0), Drafting(len(seconds) - 1)
    chosen, taken, tokens = [], 0.0, 0
    for cycle in range(cycles):
        depth, accepted = drafting.depth(1), 0
        while accepted < depth and generator.random() < acceptance[accepted]:
            accepted += 1
        time = seconds[depth] * (3 if any(cycle in hiccup for hiccup in hiccups) else 1)
        drafting.record(depth, time, [verdicts(accepted, depth)])
        chosen.append(depth)
        taken, tokens = taken + time, tokens + 1 + accepted
    return chosen, tokens / taken * seconds[0]


@pytest.mark.parametrize("acceptance", [[0.0, 0.0], [0.4, 0.2], [0.9, 0.9]], ids=str)
@pytest.mark.parametrize("seconds", [[1, 1.1, 1.2], [1, 1.6, 2.3], [1, 2.1, 3.2]], ids=str)
def test_choosing_a_depth_is_never_much_worse_than_no_drafts(seconds, acceptance):
    assert simulated(seconds, acceptance, 200)[1] > 0.9
    assert simulated(seconds, acceptance, 5000)[1] > 0.98


def test_a_depth_that_cannot_pay_is_left_alone():
    chosen, _ = simulated([1, 2.1, 3.2], [0.9, 0.9], 2000)
    assert not any(chosen[300:])


@pytest.mark.parametrize("start", range(0, 120, 5))
def test_a_hiccup_turns_drafting_on_for_a_short_time_only(start):
    chosen, _ = simulated([1, 1.6, 2.3], [0.4, 0.2], 1000, [range(start, start + 8)])
    assert sum(map(bool, chosen)) < 100
