"""The MTP chain: its targets by hand, its logits against transformers' own, and the loss of all heads together."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from moonwhale.model import loss as loss_module
from moonwhale.model import mtp
from moonwhale.model.documents import Documents
from moonwhale.model.loss import linear_cross_entropy
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM
from moonwhale.model.mtp import MTPModule, prediction_targets, shifted_labels

V = 61
NO = -100


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# --- targets ---------------------------------------------------------------------------------------------------------

# Two documents with padding after them; padding before a document; a document with a prompt that has no loss.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
LABELS = torch.tensor(
    [[10, 11, 12, 13, 20, 21, 22, NO], [NO, NO, 32, 33, 34, 35, 36, 37], [NO, NO, NO, 43, 44, 45, 46, 47]]
)
TARGETS = {
    0: [
        [11, 12, 13, NO, 21, 22, NO, NO],
        [NO, NO, 33, 34, 35, 36, 37, NO],
        [NO, NO, 43, 44, 45, 46, 47, NO],
    ],
    1: [
        [12, 13, NO, NO, 22, NO, NO, NO],
        [NO, NO, 34, 35, 36, 37, NO, NO],
        [NO, 43, 44, 45, 46, 47, NO, NO],
    ],
    2: [
        [13, NO, NO, NO, NO, NO, NO, NO],
        [NO, NO, 35, 36, 37, NO, NO, NO],
        [43, 44, 45, 46, 47, NO, NO, NO],
    ],
    8: [[NO] * 8] * 3,
}


def assert_targets_by_hand():
    documents = Documents.from_inputs(3, 8, MASK.device, MASK, POSITIONS)
    for depth, expected in TARGETS.items():
        assert mtp.shifted_labels(LABELS, documents, depth).tolist() == expected, depth


def test_targets_by_hand():
    assert_targets_by_hand()


def test_one_token_has_no_target():
    documents = Documents.from_inputs(2, 1, MASK.device, None, None)
    for depth in range(3):
        assert shifted_labels(torch.tensor([[3], [4]]), documents, depth).tolist() == [[NO], [NO]]


# --- logits ----------------------------------------------------------------------------------------------------------


def their_chain(ours):
    """Returns transformers' main model and MTP modules with our weights."""
    names = {f.name for f in dataclasses.fields(DeepseekV3Config)}
    config = DeepseekV3Config(
        **{k: v for k, v in ours.config.to_dict().items() if k in names}, num_mtp_layers=ours.config.num_mtp_layers
    )
    main = DeepseekV3ForCausalLM(config).eval()
    n, own = config.num_hidden_layers, {}
    state = ours.state_dict()
    for name in [name for name in state if name.startswith("model.layers.") and int(name.split(".")[2]) >= n]:
        _, _, layer, part = name.split(".", 3)
        if part not in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
            part = "post_norm.weight" if part == "shared_head.norm.weight" else f"mtp_block.{part}"
        own[f"layers.{int(layer) - n}.{part}"] = state.pop(name)
    main.load_state_dict(state, strict=True)
    chain = MtpModel(main, config.num_nextn_predict_layers).eval()
    report = chain.load_state_dict(own, strict=False)
    assert not report.unexpected_keys
    assert all(name.startswith(("embed_tokens", "shared_head")) for name in report.missing_keys)
    return main, chain


def assert_logits_are_transformers(ours):
    ids = tokens(2, 19)
    main, chain = their_chain(ours)
    with torch.no_grad():
        body = ours.model(ids, with_mtp=True, use_cache=False)
        hidden = main.model(ids, use_cache=False).last_hidden_state
        assert torch.allclose(body.last_hidden_state, hidden, atol=1e-5)
        for k in range(1, 3):
            previous, ahead = hidden[:, :-1], ids[:, k:]
            positions = torch.arange(ahead.shape[1])[None]
            hidden = chain.forward_layer(k - 1, previous, positions, None, input_ids=ahead)
            mine, theirs = ours.lm_head(body.mtp_hidden_states[k - 1][:, :-k]), main.lm_head(hidden)
            assert mine.shape == theirs.shape == (2, 19 - k, V)
            assert ((mine - theirs).abs().max() / theirs.abs().max()) < 3e-5, k


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_interleave": False, "q_lora_rank": None}, {"rms_norm_eps": 0.1}], ids=str
)
def test_logits_are_transformers(overrides, tiny_model):
    assert_logits_are_transformers(tiny_model(num_nextn_predict_layers=2, **overrides))


# Three modules: a chain, with a module of two blocks, MoBA in all but one of them.
CHAIN = {
    "num_nextn_predict_layers": 2,
    "mtp_num_blocks": [2, 1],
    "moba_topk": 2,
    "moba_block_size": 4,
    "moba_full_attention_layers": [3],
    "moba_key_conv": 2,
    "mtp_loss_weight": 0.6,
}


@pytest.fixture
def chain(tiny_model):
    return lambda **overrides: tiny_model(**{**CHAIN, "aux_loss_alpha": 0.0, **overrides})


def test_modules_are_causal(chain):
    """Module k at position i depends on every token up to i + k, and on no later one."""
    model, ids = chain(), tokens(1, 19)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % V
    with torch.no_grad():
        before, after = (model.model(x, with_mtp=True, use_cache=False) for x in (ids, changed))
    hidden = zip(
        (before.last_hidden_state, *before.mtp_hidden_states),
        (after.last_hidden_state, *after.mtp_hidden_states),
        strict=True,
    )
    for k, (a, b) in enumerate(hidden):
        moved = ((a - b).abs() > 1e-4).any(-1)[0, : 19 - k]
        assert moved.nonzero()[0].item() == 11 - k, k


def test_every_block_has_an_index_of_its_own(chain):
    model = chain(mtp_num_blocks=[3, 2])
    blocks = [b for module in model.model.layers for b in (module, *getattr(module, "blocks", ()))]
    assert [b.self_attn.layer_idx for b in blocks] == list(range(7)) and model.config.num_blocks == 7
    assert [b.self_attn.topk for b in blocks] == [2, 2, 2, 0, 2, 2, 2]


def test_every_parameter_gets_a_gradient(chain):
    model, ids = chain().train(), tokens(2, 19)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# --- the loss --------------------------------------------------------------------------------------------------------


def loss_by_hand(model, ids, labels, mask, positions, weight):
    """Compute main + λ/D Σ_k from whole logits, each depth as the mean over its own targets."""
    body = model.model(ids, mask, positions, with_mtp=True, use_cache=False)
    losses = []
    for depth, hidden in enumerate((body.last_hidden_state, *body.mtp_hidden_states)):
        rows, targets = [], []
        for row in range(len(ids)):
            for i in range(ids.shape[1]):
                j = i + 1 + depth
                between = range(i, min(j + 1, ids.shape[1]))
                whole = j < ids.shape[1] and all(mask[row, t] for t in between)
                if whole and all(positions[row, t] > 0 for t in between[1:]) and labels[row, j] != NO:
                    rows.append(hidden[row, i])
                    targets.append(labels[row, j])
        losses.append(F.cross_entropy(F.linear(torch.stack(rows), model.lm_head.weight), torch.stack(targets)))
    return losses[0] + weight / 2 * sum(losses[1:]), losses


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, expected, tolerance=1e-5):
    for name, grad in ours.items():
        assert (grad - expected[name]).abs().max() <= tolerance * max(1.0, expected[name].abs().max()), name


def ragged():
    """Returns rows with packed documents, padding and prompts, with different numbers of targets."""
    lengths = [[9, 7, -4], [-6, 14], [20], [3, 11, 6]]
    mask = torch.tensor([[int(n > 0) for n in row for _ in range(abs(n))] for row in lengths])
    positions = torch.tensor([[i for n in row for i in range(abs(n))] for row in lengths])
    ids = tokens(4, 20, seed=2)
    labels = ids.masked_fill((positions == 0) | (mask == 0), NO)
    labels[2, :9] = NO
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def assert_loss_by_hand(model):
    batch = ragged()
    out = model.train()(**batch)
    by_hand, losses = loss_by_hand(
        model, batch["input_ids"], batch["labels"], batch["attention_mask"], batch["position_ids"], 0.6
    )
    assert torch.allclose(out.loss, by_hand) and torch.allclose(out.losses, torch.stack(losses))
    assert_same_gradients(gradients(model, out.loss), gradients(model, by_hand))


def test_loss_by_hand(chain):
    assert_loss_by_hand(chain())


def test_parts_of_the_loss(chain):
    model, batch = chain(aux_loss_alpha=0.2).train(), ragged()
    out = model(**batch)
    assert out.logits is None
    parts = out.losses[0] + 0.6 / 2 * out.losses[1:].sum() + out.balance_loss
    assert torch.allclose(out.loss, parts) and out.balance_loss > 0.2
    documents = Documents.from_inputs(4, 20, MASK.device, batch["attention_mask"], batch["position_ids"])
    assert out.targets.tolist() == [
        (shifted_labels(batch["labels"], documents, d) != NO).sum().item() for d in range(3)
    ]
    assert out.targets.unique().numel() == 3
    model.mtp_loss_weight = 0.0  # a schedule may lower it, and the modules are not run then
    resting = model(**batch)
    assert torch.allclose(resting.loss, out.losses[0] + resting.balance_loss)
    assert resting.losses.shape == (1,) and 0.1 < resting.balance_loss < out.balance_loss
    whole = model.eval()(**batch)
    hits = whole.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    assert whole.accuracies[0] == hits.sum() / out.targets[0]
    assert torch.allclose(whole.losses, out.losses)


def assert_micro_batches_are_the_large_batch(model):
    """Micro-batches are given the number of targets of each depth, which differs between rows."""
    batch = ragged()
    model.train()
    whole = model(**batch)
    expected = gradients(model, whole.loss)
    losses = []
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = {name: x[rows] for name, x in batch.items()}
        losses.append(model(**part, num_items_in_batch=whole.targets).loss)
        losses[-1].backward()
    assert torch.allclose(sum(losses), whole.loss)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected)


def test_micro_batches_are_the_large_batch(chain):
    assert_micro_batches_are_the_large_batch(chain())


def test_micro_batches_of_equal_rows(chain):
    """This includes the balance loss. With equal rows, the main head's number of targets does as well as the vector."""
    model = chain(aux_loss_alpha=0.2).train()
    ids = tokens(4, 20)
    whole = model(ids, labels=ids)
    expected = gradients(model, whole.loss)
    for items in (whole.targets, whole.targets[0], whole.targets[0].item()):
        halves = [model(half, labels=half, num_items_in_batch=items).loss for half in ids.split(2)]
        assert torch.allclose(sum(halves), whole.loss)
        assert_same_gradients(gradients(model, sum(halves)), expected)


def test_one_number_weighs_every_depth_alike(chain):
    model, batch = chain(aux_loss_alpha=0.2).train(), ragged()
    whole = model(**batch)
    part = model(**batch, num_items_in_batch=4 * whole.targets[0])
    assert torch.allclose(part.loss, whole.loss / 4)


def test_targets_computed_before_are_the_same(chain):
    model, batch = chain().train(), ragged()
    documents = Documents.from_inputs(4, 20, MASK.device, batch["attention_mask"], batch["position_ids"])
    targets = prediction_targets(batch["labels"], documents, 2)
    found, expected = model(**batch, documents=documents, targets=targets), model(**batch)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.targets, expected.targets)
    targets[2] = NO
    assert model(**batch, documents=documents, targets=targets).targets.tolist() == [*expected.targets[:2], 0]


def test_no_targets_no_loss(chain):
    model, ids = chain().train(), tokens(2, 7)
    out = model(ids, labels=torch.full_like(ids, NO))
    out.loss.backward()
    assert out.loss == 0 and (out.losses == 0).all() and (out.targets == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())


def assert_documents_are_apart(model):
    """A document's losses and gradients do not depend on the document before it in its row."""
    second = tokens(1, 9, seed=1)
    alone = model(second, labels=second)
    expected = gradients(model, alone.loss)
    positions = torch.cat([torch.arange(11), torch.arange(9)])[None]
    for seed in (3, 4):
        ids = torch.cat([tokens(1, 11, seed=seed), second], dim=1)
        labels = ids.clone()
        labels[:, :11] = NO
        out = model(ids, position_ids=positions, labels=labels)
        assert torch.allclose(out.losses, alone.losses)
        assert_same_gradients(gradients(model, out.loss), expected)
    labels = positions.clone()  # with labels everywhere, no target crosses the border
    assert model(tokens(1, 20), position_ids=positions, labels=labels).targets.tolist() == [18, 16, 14]


def test_documents_are_apart(chain):
    assert_documents_are_apart(chain().train())


# --- the chunked cross-entropy ---------------------------------------------------------------------------------------


def assert_cross_entropy(n=37, ignored=(0, 5, 6, 36), dtype=torch.float32):
    labels = tokens(n)
    labels[list(ignored)] = NO
    row_weight = normal(n, seed=3).abs()
    results = []
    for function in (linear_cross_entropy, None):
        hidden, weight = normal(n, 8).to(dtype).requires_grad_(), normal(V, 8, seed=1).requires_grad_()
        if function:
            loss, nll, correct = function(hidden, weight, labels, row_weight)
        else:
            logits = F.linear(hidden.float(), weight)
            nll = F.cross_entropy(logits, labels, reduction="none")
            loss, correct = (nll * row_weight).sum(), (logits.argmax(-1) == labels)
        (3 * loss).backward()
        results.append((loss, nll, hidden.grad.float(), weight.grad))
        if function:
            flags = correct
    assert torch.equal(flags, correct) or dtype != torch.float32
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_cross_entropy_is_torchs(chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_PER_CHUNK", chunk)
    assert_cross_entropy()
    assert_cross_entropy(ignored=())
    assert_cross_entropy(ignored=range(37))
    assert_cross_entropy(dtype=torch.bfloat16)


def test_cross_entropy_of_large_logits():
    hidden, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    nll = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.ones(2))[1]
    assert nll.tolist() == [0, 2e4]


class LargestLogits(TorchDispatchMode):
    """Return the largest number of rows of logits that any tensor holds."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == V:
                self.rows = max(self.rows, x.numel() // V)
        return out


def test_logits_are_never_whole(chain, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_PER_CHUNK", 8)
    model, ids = chain(hidden_size=40).train(), tokens(2, 19)
    with LargestLogits() as seen:
        model(ids, labels=ids).loss.backward()
    assert 8 <= seen.rows <= 40  # the head's transpose is (hidden, V)
    with LargestLogits() as seen:
        model(tokens(4, 19))
    assert seen.rows == 4 * 19


def test_evaluation_makes_no_gradient(chain):
    """This holds inside the function too: a gradient of the head would be as large as the head."""
    model, ids = chain().eval(), tokens(2, 19)
    expected = model(ids, labels=ids).loss
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                shapes.append(tuple(out.shape))
            return out

    with torch.no_grad(), Products():
        assert torch.equal(model(ids, labels=ids).loss, expected)
    assert (V, 32) not in shapes and any(shape[1] == V for shape in shapes)


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def test_mutant_concatenated_the_other_way_round(tiny_model):
    model = tiny_model(num_nextn_predict_layers=2)
    model.model.layers[2].eh_proj.register_forward_pre_hook(lambda _, args: (args[0].roll(32, -1),))
    caught(assert_logits_are_transformers, model)


def test_mutant_no_norm_before_the_head(tiny_model):
    model = tiny_model(num_nextn_predict_layers=2)
    model.model.layers[2].shared_head["norm"].forward = lambda x: x
    caught(assert_logits_are_transformers, model)


def test_mutant_main_models_hidden_state_for_every_module(tiny_model, monkeypatch):
    right, first = MTPModule.forward, []

    def forward(self, hidden, *args):
        first.append(hidden)
        return right(self, first[0], *args)

    monkeypatch.setattr(MTPModule, "forward", forward)
    caught(assert_logits_are_transformers, tiny_model(num_nextn_predict_layers=2))


def test_mutant_embedding_of_the_same_token(tiny_model, monkeypatch):
    right = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, k, dims: right(x, k + 1, dims=dims))
    caught(assert_logits_are_transformers, tiny_model(num_nextn_predict_layers=2))


def mutate_targets(monkeypatch, shifted):
    monkeypatch.setattr(mtp, "shifted_labels", shifted)


def test_mutant_labels_shifted_by_one_too_few(chain, monkeypatch):
    mutate_targets(monkeypatch, lambda labels, documents, depth: shifted_labels(labels, documents, max(depth - 1, 0)))
    caught(assert_targets_by_hand)
    caught(assert_loss_by_hand, chain())


def test_mutant_targets_across_documents(chain, monkeypatch):
    def across(labels, documents, depth):
        targets = torch.full_like(labels, NO)
        targets[:, : -1 - depth] = labels[:, 1 + depth :]
        return targets

    mutate_targets(monkeypatch, across)
    caught(assert_targets_by_hand)
    caught(assert_loss_by_hand, chain())
    caught(assert_documents_are_apart, chain().train())


def test_mutant_attention_across_documents(chain, monkeypatch):
    """Only attention takes a row for one document. Positions and targets stay right."""
    right = MultiheadLatentAttention.forward

    def forward(self, x, rotation, documents, *rest):
        return right(self, x, rotation, Documents.from_inputs(*x.shape[:2], x.device), *rest)

    monkeypatch.setattr(MultiheadLatentAttention, "forward", forward)
    caught(assert_documents_are_apart, chain().train())


def test_mutant_normalised_by_the_main_heads_count(chain, monkeypatch):
    right = MoonwhaleForCausalLM.losses

    def losses(self, body, targets, num_items):
        main = (targets[0] != NO).sum() if num_items is None else num_items[0]
        return right(self, body, targets, main.expand(3))

    monkeypatch.setattr(MoonwhaleForCausalLM, "losses", losses)
    caught(assert_loss_by_hand, chain())


def test_mutant_every_micro_batch_by_its_own_count(chain, monkeypatch):
    right = MoonwhaleForCausalLM.losses

    def losses(self, body, targets, num_items):
        fields = right(self, body, targets, None)
        return fields | {"loss": fields["loss"] if num_items is None else fields["loss"] / 3}

    monkeypatch.setattr(MoonwhaleForCausalLM, "losses", losses)
    caught(assert_micro_batches_are_the_large_batch, chain())


def test_mutant_gradient_not_scaled_by_what_follows(monkeypatch):
    right = loss_module._LinearCrossEntropy.backward
    monkeypatch.setattr(
        loss_module._LinearCrossEntropy, "backward", staticmethod(lambda ctx, d, *_: right(ctx, torch.ones_like(d)))
    )
    caught(assert_cross_entropy)
