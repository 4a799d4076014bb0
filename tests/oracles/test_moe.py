"""DeepSeekMoE by hand, in fp64, one token at a time: routing, experts, balance losses, and the balancing bias."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moonwhale.model import MoonwhaleForCausalLM, MoonwhaleModel
from moonwhale.model.block import Block
from moonwhale.model.moe import DeepseekMoE, Experts, Router, Routing
from moonwhale.model.pretrained import MoonwhalePreTrainedModel

HIDDEN = 32
ROUTERS = {
    "DeepSeek-V3": {},
    "as they are": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "softmax": {"scoring_func": "softmax", "norm_topk_prob": False},
    "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "one expert": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 6},
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def tiny_moe(tiny_config, draw):
    return lambda **overrides: draw(DeepseekMoE(tiny_config(**overrides)))


def close(ours, oracle):
    return torch.allclose(ours.double(), oracle, rtol=1e-5, atol=1e-6)


# --- routing ---------------------------------------------------------------------------------------------------------


def scores_by_hand(x, weight, config):
    logits = x @ weight.T
    if config.scoring_func == "softmax":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    return 1 / (1 + (-logits).exp())


def chosen_by_hand(scores, config):
    """Return the experts that one token chooses by its scores (E,), with or without the bias."""
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted(scores[group].tolist())[-2:]))
    allowed = [expert for group in groups[: config.topk_group] for expert in group]
    return sorted(allowed, key=lambda e: -scores[e].item())[: config.num_experts_per_tok]


def gates_by_hand(x, weight, bias, config):
    """Return the gates as (N, E), zero where an expert is not chosen."""
    scores = scores_by_hand(x, weight, config)
    gates = torch.zeros_like(scores)
    for token, s in enumerate(scores):
        chosen = chosen_by_hand(s.detach() + bias, config)
        total = s[chosen].sum() if config.norm_topk_prob else 1.0
        for expert in chosen:
            gates[token, expert] = s[expert] / total * config.routed_scaling_factor
    return gates


def assert_routing_by_hand(router, config):
    x, weight = normal(40, HIDDEN), router.weight.detach().double().requires_grad_()
    routing = router(x.float())
    assert routing.index.shape == routing.gates.shape == (40, config.num_experts_per_tok)
    ours = torch.zeros(routing.scores.shape).scatter(1, routing.index, routing.gates)
    oracle = gates_by_hand(x, weight, router.e_score_correction_bias.double(), config)
    assert close(routing.scores, scores_by_hand(x, weight, config)) and close(ours, oracle)
    router.zero_grad()
    (ours * normal(*ours.shape, seed=1)).sum().backward()
    (oracle * normal(*ours.shape, seed=1)).sum().backward()
    assert close(router.weight.grad, weight.grad)


@pytest.mark.parametrize("overrides", ROUTERS.values(), ids=ROUTERS)
def test_routing_by_hand(overrides, tiny_config, draw):
    config = tiny_config(**overrides)
    assert_routing_by_hand(draw(Router(config)), config)


def test_the_bias_changes_only_the_choice(tiny_moe):
    router = tiny_moe().gate
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert "e_score_correction_bias" in router.state_dict()
    x = normal(40, HIDDEN).float()
    before = router(x)
    router.e_score_correction_bias[2] = 10.0
    after = router(x)
    assert torch.equal(before.scores, after.scores) and (after.index == 2).any(1).all()
    assert not after.gates.max() > 1


def test_routing_is_fp32_under_autocast(tiny_moe):
    router = tiny_moe().gate
    x = normal(40, HIDDEN).bfloat16()
    with torch.autocast(x.device.type, torch.bfloat16):
        routing = router(x)
    assert routing.scores.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.scores, F.linear(x.float(), router.weight).sigmoid())


# --- experts ---------------------------------------------------------------------------------------------------------

CHOICES = {
    "spread": torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(23)]),
    "two experts without tokens": torch.tensor([[0, 2], [3, 5], [2, 3], [5, 0], [0, 5]]),
    "everybody to the same two": torch.tensor([[4, 1]] * 9),
    "one token": torch.tensor([[5, 0]]),
}


def experts_by_hand(x, index, gates, gate_up, down):
    out = []
    for token, (experts, weights) in enumerate(zip(index.tolist(), gates, strict=True)):
        total = 0.0
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (gate_up[expert] @ x[token]).split(16)
            total = total + weight * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
        out.append(total)
    return torch.stack(out)


def assert_experts_by_hand(experts, index):
    n = len(index)
    leaves = [normal(n, HIDDEN), normal(n, 2, seed=1), experts.gate_up_proj.data, experts.down_proj.data]
    results = []
    for dtype in (torch.float32, torch.float64):
        x, gates, gate_up, down = (leaf.to(dtype).clone().requires_grad_() for leaf in leaves)
        if dtype is torch.float32:
            experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w) for w in (gate_up, down))
            gate_up, down = experts.gate_up_proj, experts.down_proj
            out = experts(x, index, gates)
        else:
            out = experts_by_hand(x, index, gates, gate_up, down)
        (out * normal(n, HIDDEN, seed=2).to(dtype)).sum().backward()
        results.append([out, x.grad, gates.grad, gate_up.grad, down.grad])
    for name, ours, oracle in zip(("out", "x", "gates", "gate_up", "down"), *results, strict=True):
        assert torch.allclose(ours.double(), oracle, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("index", CHOICES.values(), ids=CHOICES)
def test_experts_by_hand(index, tiny_moe):
    assert_experts_by_hand(tiny_moe().experts, index)


def test_experts_in_bf16(tiny_moe):
    experts, index = tiny_moe().experts, CHOICES["spread"]
    x, gates = normal(len(index), HIDDEN), normal(len(index), 2, seed=1)
    oracle = experts_by_hand(x, index, gates, experts.gate_up_proj.double(), experts.down_proj.double())
    ours = experts(x.bfloat16(), index, gates.float())
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - oracle).norm() / oracle.norm()) < 0.02


def test_shared_experts_serve_every_token(tiny_moe):
    x, valid = normal(2, 5, HIDDEN).float(), torch.ones(2, 5, dtype=torch.bool)
    for shared in (0, 2):
        moe = tiny_moe(n_shared_experts=shared)
        routing = moe.gate(x.flatten(0, 1))
        expected = moe.experts(x.flatten(0, 1), routing.index, routing.gates).view_as(x)
        if shared:
            assert moe.shared_experts.up_proj.weight.shape == (32, HIDDEN)
            expected = expected + moe.shared_experts(x)
        assert torch.allclose(moe(x, valid)[0], expected, atol=1e-6)


# --- balance losses --------------------------------------------------------------------------------------------------

VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
LOSSES = {
    "sequence": {"balance_loss": "sequence"},
    "expert": {"balance_loss": "expert"},
    "device": {"balance_loss": "device", "n_device_groups": 3},
    "sequence, groups": {"balance_loss": "sequence", "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "expert, softmax": {"balance_loss": "expert", "scoring_func": "softmax", "norm_topk_prob": False},
    "sequence, softmax": {"balance_loss": "sequence", "scoring_func": "softmax"},
}


def loss_by_hand(rows, weight, bias, config):
    """Compute α Σ f_i P_i as in the papers, on a list of rows (T, hidden) without padding."""
    n, k, alpha = config.n_routed_experts, config.num_experts_per_tok, config.aux_loss_alpha

    def f(scores, bias):
        count = torch.zeros(n, dtype=torch.float64)
        for s in scores:
            if config.balance_loss == "sequence":  # equation 18: the K largest scores, whatever their group
                chosen = sorted(range(n), key=lambda expert: -s[expert].item())[:k]
            else:
                chosen = chosen_by_hand(s.detach() + bias, config)
            for expert in chosen:
                count[expert] += 1
        return n / (k * len(scores)) * count

    if config.balance_loss == "sequence":  # DeepSeek-V3, equations 17 to 20
        losses = []
        for x in rows:
            s = scores_by_hand(x, weight, config)
            p = (s / s.sum(-1, keepdim=True)).mean(0)
            losses.append(alpha * (f(s, 0.0) * p).sum())
        return sum(losses) / len(losses)
    s = scores_by_hand(torch.cat(rows), weight, config)
    # DeepSeekMoE, equations 12 to 14. Its s is a softmax, so sigmoid scores are normalised as in Megatron-LM.
    frequency, p = f(s, bias), (s / s.sum(-1, keepdim=True)).mean(0)
    if config.balance_loss == "expert":
        return alpha * (frequency * p).sum()
    size = n // config.n_device_groups  # equations 15 to 17
    devices = [range(d * size, (d + 1) * size) for d in range(config.n_device_groups)]
    return alpha * sum(frequency[list(d)].mean() * p[list(d)].sum() for d in devices)


def assert_loss_by_hand(moe, config):
    x = normal(*VALID.shape, HIDDEN)
    weight = moe.gate.weight.detach().double().requires_grad_()
    rows = [row[valid] for row, valid in zip(x, VALID, strict=True)]
    ours = moe(x.float(), VALID)[1]
    oracle = loss_by_hand(rows, weight, moe.gate.e_score_correction_bias.double(), config)
    moe.zero_grad()
    ours.backward()
    oracle.backward()
    assert close(ours, oracle) and close(moe.gate.weight.grad, weight.grad)


@pytest.fixture
def losing(tiny_config, draw):
    def losing(name):
        config = tiny_config(aux_loss_alpha=0.3, **LOSSES[name])
        return draw(DeepseekMoE(config)), config

    return losing


@pytest.mark.parametrize("name", LOSSES)
def test_balance_loss_by_hand(name, losing):
    assert_loss_by_hand(*losing(name))


@pytest.mark.parametrize("off", [{"balance_loss": "none"}, {"aux_loss_alpha": 0.0}], ids=str)
def test_balance_loss_can_be_off(off, tiny_moe):
    assert tiny_moe(**off)(normal(3, 7, HIDDEN).float(), VALID)[1] == 0


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["sequence", "expert", "device"])
def test_even_routing_costs_alpha_and_pulls_at_no_score(balance, scoring, tiny_moe):
    """With f_i = 1 and Σ P_i = 1 the loss is α, whatever the scores, so that no router's weight has a gradient."""
    moe = tiny_moe(aux_loss_alpha=0.3, balance_loss=balance, scoring_func=scoring, n_device_groups=3)
    logits = torch.tensor([[1.0, 0.5, 0.2, -0.3, -0.9, -2.0]]).repeat(6, 1)
    rolled = torch.stack([row.roll(2 * i) for i, row in enumerate(logits)]).requires_grad_()
    scores = rolled.softmax(-1) if scoring == "softmax" else rolled.sigmoid()
    index = scores.topk(2).indices  # tokens choose 0 and 1, 2 and 3, 4 and 5, and the same again
    loss = moe.balance_loss(Routing(scores, index, scores.gather(1, index)), torch.ones(1, 6).bool())
    loss.backward()
    assert torch.isclose(loss, torch.tensor(0.3)) and rolled.grad.abs().max() < 1e-7


def test_uneven_routing_costs_more_than_alpha(tiny_moe):
    """Even routing costs α = 0.3. Choosing only the two best experts costs more."""
    moe = tiny_moe(aux_loss_alpha=0.3, n_shared_experts=0, balance_loss="expert", scoring_func="softmax")
    p = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.08, 0.05])  # the scores of each token
    moe.gate.weight.data.copy_(p.log()[:, None] / HIDDEN)
    even, uneven = torch.arange(12).view(6, 2) % 6, torch.tensor([[0, 1]] * 6)
    for index, f_p in ((even, 1.0), (uneven, 3 * 0.3 + 3 * 0.25)):  # f_i = 6 / (2 * 6) * 6 = 3 for the two
        moe.gate.choose = lambda _, index=index: index
        loss = moe(torch.ones(1, 6, HIDDEN), torch.ones(1, 6).bool())[1]
        assert torch.isclose(loss, torch.tensor(0.3 * f_p))


# --- the bias and its statistics -------------------------------------------------------------------------------------


def assert_bias_follows_load(moe):
    bias = moe.gate.e_score_correction_bias
    bias.zero_()
    moe.load.copy_(torch.tensor([9.0, 4.0, 4.0, 4.0, 1.0, 2.0]))  # mean 4
    moe.update_bias_()
    assert torch.equal(bias, 0.001 * torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    moe.update_bias_()
    assert torch.equal(bias, 0.002 * torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))


def test_bias_follows_load(tiny_moe):
    assert_bias_follows_load(tiny_moe())
    still = tiny_moe(bias_update_speed=0.0)
    before = still.gate.e_score_correction_bias.clone()
    still.load[0] = 5.0
    still.update_bias_()
    assert torch.equal(still.gate.e_score_correction_bias, before)


def assert_bias_stays_fp32(model, folder):
    model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(1.0 + 2**-20)
    model.save_pretrained(folder)
    loaded = MoonwhaleForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    moe = loaded.model.layers[0].mlp
    assert moe.experts.down_proj.dtype == torch.bfloat16
    assert torch.equal(moe.gate.e_score_correction_bias, model.model.layers[0].mlp.gate.e_score_correction_bias)
    assert moe.load.dtype == loaded.model.layers[0].self_attn.max_logit.dtype == torch.float32


def test_bias_stays_fp32(tiny_model, tmp_path):
    assert_bias_stays_fp32(tiny_model(), tmp_path)


IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :4] = MASK[2, 7:] = 0
CHAIN = {"num_nextn_predict_layers": 2, "mtp_num_blocks": [2, 1], "moba_topk": 2, "moba_block_size": 4}


def step(model, checkpointing):
    """Return loads, largest logits, losses and gradients of two micro-batches."""
    model = model.train()
    for block in model.modules():
        if isinstance(block, Block):
            block.self_attn.max_logit.fill_(-torch.inf)
            block.mlp.load.zero_()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.zero_grad()
    losses = []
    for rows in (slice(0, 2), slice(2, 3)):
        out = model(IDS[rows], attention_mask=MASK[rows], labels=IDS[rows].masked_fill(MASK[rows] == 0, -100))
        out.loss.backward()
        losses.append(out.loss.detach())
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    return {
        "loss": torch.stack(losses),
        "load": torch.stack([block.mlp.load.clone() for block in blocks]),
        "max_logit": torch.stack([block.self_attn.max_logit.clone() for block in blocks]),
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }


def assert_counted_once(model):
    plain, checkpointed = step(model, False), step(model, True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    # 27 tokens in all; a module k of the chain counts those that have a k-th next one.
    assert plain["load"].sum(1).tolist() == [2 * n for n in (27, 27, 24, 24, 21)]


def test_checkpointing_counts_once_and_changes_no_gradient(tiny_model, monkeypatch):
    calls, right = [], DeepseekMoE.forward
    monkeypatch.setattr(DeepseekMoE, "forward", lambda *args, **kwargs: calls.append(1) or right(*args, **kwargs))
    assert_counted_once(tiny_model(**CHAIN))
    assert len(calls) > 2 * 2 * 5  # checks that layers were recomputed


def test_load_by_hand(tiny_model):
    """Count the experts that the real tokens choose in the first layer."""
    model = tiny_model().train()
    seen = []
    moe = model.model.layers[0].mlp
    moe.gate.register_forward_hook(lambda _, args, out: seen.append(out.index))
    model(IDS, attention_mask=MASK, collect_statistics=True)
    chosen = seen[0].view(3, 12, 2)[MASK.bool()]
    assert torch.equal(moe.load, torch.bincount(chosen.flatten(), minlength=6).float())


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_collects_nothing(training, tiny_model):
    """Without gradients nothing is collected, even in training mode, unless the caller asks for it."""
    model = tiny_model(**CHAIN).train(training)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, labels=IDS)
    model(IDS, attention_mask=MASK)
    model(IDS, attention_mask=MASK, labels=IDS, collect_statistics=False)
    model.generate(IDS[:1], max_new_tokens=3)
    for block in model.modules():
        if isinstance(block, Block):
            assert (block.mlp.load == 0).all() and (block.self_attn.max_logit == -torch.inf).all()
    model(IDS, attention_mask=MASK, labels=IDS)
    assert all(block.mlp.load.any() for block in model.modules() if isinstance(block, Block))


@pytest.mark.parametrize("name", LOSSES)
def test_balance_joins_the_loss_of_every_layer(name, tiny_model):
    off = {"balance_loss": "none"}
    model, without = (tiny_model(**LOSSES[name] | {"aux_loss_alpha": 0.3} | o).train() for o in ({}, off))
    totals = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: totals.append(out[1]))
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: totals.append(out[1]))
    out = model(IDS, labels=IDS)
    assert torch.isclose(out.balance_loss, sum(totals)) and min(totals) > 0
    assert torch.isclose(out.loss, without(IDS, labels=IDS).loss + sum(totals))


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def test_mutant_bias_in_the_gates(tiny_config, draw, monkeypatch):
    right = Router.forward

    def biased(self, x):
        routing = right(self, x)
        gates = (routing.scores + self.e_score_correction_bias).gather(1, routing.index)
        return routing._replace(gates=gates / gates.sum(-1, keepdim=True))

    monkeypatch.setattr(Router, "forward", biased)
    caught(assert_routing_by_hand, draw(Router(tiny_config())), tiny_config())


def test_mutant_bias_forgotten(tiny_config, draw, monkeypatch):
    right = Router.choose
    monkeypatch.setattr(Router, "choose", lambda self, s: right(self, s - self.e_score_correction_bias))
    caught(assert_routing_by_hand, draw(Router(tiny_config())), tiny_config())


def test_mutant_groups_by_their_best_expert_alone(tiny_config, draw, monkeypatch):
    def choose(self, scores):
        grouped = scores.view(len(scores), self.groups, -1)
        best = grouped.amax(-1).topk(self.topk_groups).indices
        shut = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(shut[..., None], -torch.inf).flatten(1).topk(self.topk).indices

    monkeypatch.setattr(Router, "choose", choose)
    config = tiny_config(**ROUTERS["groups"])
    caught(assert_routing_by_hand, draw(Router(config)), config)


def test_mutant_dropped_tokens(tiny_moe, monkeypatch):
    right = Experts.forward

    def with_capacity(self, x, index, gates):
        rank = (F.one_hot(index.flatten(), 6).cumsum(0) - 1).gather(1, index.flatten()[:, None]).view_as(index)
        return right(self, x, index, gates * (rank < 8))

    monkeypatch.setattr(Experts, "forward", with_capacity)
    assert_experts_by_hand(tiny_moe().experts, CHOICES["one token"])
    caught(assert_experts_by_hand, tiny_moe().experts, CHOICES["everybody to the same two"])


def test_mutant_outputs_of_other_choices(tiny_moe, monkeypatch):
    right = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda self, x, index, gates: right(self, x, index, gates.flip(1)))
    caught(assert_experts_by_hand, tiny_moe().experts, CHOICES["spread"])


def mutate_loss(monkeypatch, change):
    right = DeepseekMoE.balance_loss
    monkeypatch.setattr(
        DeepseekMoE, "balance_loss", lambda self, routing, valid: right(self, *change(self, routing, valid))
    )


def test_mutant_softmax_scores_in_the_sequence_loss(losing, monkeypatch):
    mutate_loss(monkeypatch, lambda moe, r, valid: (r._replace(scores=r.scores.logit().softmax(-1)), valid))
    caught(assert_loss_by_hand, *losing("sequence"))


def test_mutant_padding_in_the_losses(losing, monkeypatch):
    mutate_loss(monkeypatch, lambda moe, routing, valid: (routing, torch.ones_like(valid)))
    for name in ("sequence", "expert", "device"):
        caught(assert_loss_by_hand, *losing(name))


def test_mutant_biased_choice_in_the_sequence_loss(losing, monkeypatch):
    right = DeepseekMoE.balance_loss

    def biased(self, routing, valid):
        biased_scores = routing.scores + self.gate.e_score_correction_bias
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", lambda scores, k, **_: torch.topk(biased_scores, k))
            return right(self, routing, valid)

    monkeypatch.setattr(DeepseekMoE, "balance_loss", biased)
    caught(assert_loss_by_hand, *losing("sequence"))


def test_mutant_group_limited_choice_in_the_sequence_loss(losing, monkeypatch):
    right = DeepseekMoE.balance_loss

    def limited(self, routing, valid):
        with monkeypatch.context() as patch:
            index = self.gate.choose(routing.scores)
            patch.setattr(torch.Tensor, "topk", lambda *_, **__: SimpleNamespace(indices=index))
            return right(self, routing, valid)

    assert_loss_by_hand(*losing("sequence, groups"))
    monkeypatch.setattr(DeepseekMoE, "balance_loss", limited)
    caught(assert_loss_by_hand, *losing("sequence, groups"))


def test_mutant_unbiased_choice_in_the_expert_loss(losing, monkeypatch):
    mutate_loss(monkeypatch, lambda moe, r, valid: (r._replace(index=moe.gate.choose(r.scores)), valid))
    caught(assert_loss_by_hand, *losing("expert"))


def test_mutant_sign_inverted(tiny_moe, monkeypatch):
    right = DeepseekMoE.update_bias_

    def inverted(self):
        before = self.gate.e_score_correction_bias.clone()
        right(self)
        self.gate.e_score_correction_bias.copy_(2 * before - self.gate.e_score_correction_bias)

    monkeypatch.setattr(DeepseekMoE, "update_bias_", inverted)
    caught(assert_bias_follows_load, tiny_moe())


def test_mutant_bias_cast_to_bf16(tiny_model, tmp_path, monkeypatch):
    right = Router.__init__

    def init(self, config):
        right(self, config)
        self.e_score_correction_bias = self.e_score_correction_bias.to(torch.get_default_dtype())

    monkeypatch.setattr(Router, "__init__", init)
    monkeypatch.setattr(MoonwhalePreTrainedModel, "_keep_in_fp32_modules_strict", ())  # a loader would cast it back
    caught(assert_bias_stays_fp32, tiny_model(), tmp_path)


def test_mutant_counted_on_the_way(tiny_model, monkeypatch):
    right = DeepseekMoE.forward

    def forward(self, x, valid, **options):
        out, loss, load = right(self, x, valid, **options)
        self.load += load
        return out, loss, torch.zeros_like(load)

    monkeypatch.setattr(DeepseekMoE, "forward", forward)
    caught(assert_counted_once, tiny_model(**CHAIN))


def test_mutant_statistics_by_the_mode(tiny_model, monkeypatch):
    """The mutant collects whenever it is in training mode."""
    right = MoonwhaleModel.forward

    def forward(self, *args, **kwargs):
        return right(self, *args, **kwargs | {"collect_statistics": self.training})

    monkeypatch.setattr(MoonwhaleModel, "forward", forward)
    caught(test_evaluation_collects_nothing, True, tiny_model)


def test_one_expert_with_a_normalised_gate_is_warned_about(tiny_config, caplog):
    logging.Logger.warning_once.cache_clear()  # transformers' own method, which remembers what it said
    with caplog.at_level("WARNING"):
        tiny_config(num_experts_per_tok=1, norm_topk_prob=False)
        assert "no gradient" not in caplog.text
        tiny_config(num_experts_per_tok=1)
    assert caplog.text.count("set norm_topk_prob to false") == 1
