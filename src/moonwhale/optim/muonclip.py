"""MuonClip (Kimi K2, arXiv 2507.20534 §2.1): Muon for matrices and AdamW for the rest. step_hooks.py adds QK-Clip.

    optimizer = MuonClip(param_groups(model, lr=3e-4, weight_decay=0.1))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=100.0)

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by its nearest
semi-orthogonal matrix before the step. All directions of the update then count alike, the rare ones too.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moonwhale.errors import UserError
from moonwhale.optim.elementwise import descend, nesterov, small_newton_schulz
from moonwhale.optim.step_hooks import attach_hooks

__all__ = ["MuonClip", "attach_hooks", "newton_schulz", "param_groups"]

# (a, b, c) of the iteration x → a x + b x³ + c x⁵, which acts on each singular value x by itself. Muon's author chose
# them to maximise the slope a at zero, so that small singular values grow fast (3.4445⁵ = 485 times in five steps), as
# long as all values end in about [0.7, 1.2]. Exact convergence to 1 would need a smaller slope, thus more steps, and
# does not improve training.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# An orthogonalised matrix (A, B) has singular values of about 1 and so an RMS of 1 / sqrt(max(A, B)), which would make
# the update smaller the larger the matrix is. AdamW's updates have an RMS of about 0.2 to 0.4. Muon's update times
# 0.2 * sqrt(max(A, B)) matches it, so both share one learning rate and weight decay (Moonlight §2.2).
UPDATE_RMS = 0.2

CACHED_NUMBERS = 2**20 * 3 // 2  # of the matrices that a CPU orthogonalises at once, so that they stay in its caches

# What torch.compile and peft append to the name of a module that they wrap
WRAPPERS = re.compile(r"(\._orig_mod|\.modules_to_save\.[^.]+)+$")
# Modules that count as embeddings by their name: the embedding's convolution, and what peft adds to an embedding
EMBEDDINGS = ("embed_conv", "lora_embedding_A", "lora_embedding_B")


def newton_schulz(matrices: Tensor, dtype: torch.dtype | None = None, steps: int = 5) -> Tensor:
    """Bring every matrix of a stack (n, A, B) close to its nearest semi-orthogonal matrix, U Vᵀ of its SVD.

    This is Muon's quintic iteration for all matrices at once. It computes and returns `dtype`, by default bf16 if the
    device multiplies it faster, else fp32. Singular values end between about 0.7 and 1.2. A zero matrix stays zero.
    """
    dtype = dtype or _fast_dtype(matrices.device)
    if dtype is torch.bfloat16 and (done := small_newton_schulz(matrices, steps)) is not None:
        return done
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value exceeds 1
    x = x.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # so that the Gram matrix is the smaller one of the two
        x = x.mT
    pairs = steps // 2 if x.size(-1) >= 2 * x.size(-2) else 0
    for _ in range(steps - 2 * pairs):
        x = _iterate(x)
    for _ in range(pairs):
        x = _iterate_twice(x)
    return x.mT if tall else x


def _iterate(x: Tensor) -> Tensor:
    """Return a x + b G x + c G² x for the Gram matrix G = x xᵀ."""
    return torch.baddbmm(x, _polynomial(x @ x.mT), x, beta=NEWTON_SCHULZ[0])


def _iterate_twice(x: Tensor) -> Tensor:
    """Return what `_iterate` makes of x in two iterations, S₂ S₁ x with S = a I + b G + c G².

    The second Gram matrix is S₁ G S₁, so x itself, the longer matrix, takes part in two products instead of four. In
    bf16 this is as exact as single iterations. More than two at once would not be: rounding errors of G grow.
    """
    a = NEWTON_SCHULZ[0]
    gram = x @ x.mT  # (n, min(A, B), min(A, B)), as all matrices here but x
    first = _polynomial(gram)
    half = torch.baddbmm(gram, first, gram, beta=a)  # S₁ G
    second = _polynomial(torch.baddbmm(half, half, first, beta=a))
    first.diagonal(dim1=-2, dim2=-1).add_(a)  # S₁
    return torch.baddbmm(first, second, first, beta=a) @ x


def _polynomial(gram: Tensor) -> Tensor:
    """Return b G + c G²."""
    _, b, c = NEWTON_SCHULZ
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


class MuonClip(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, with AdamW-sized learning rates for both (Moonlight, arXiv 2502.16982 §2.2).

    QK-Clip, which completes MuonClip, is the step hook that `attach_hooks` adds.

    A group with `muon=True` holds 2-D weights and 3-D stacks of matrices (E, A, B). Each matrix is orthogonalised by
    itself:

        M ← μM + G
        O = NewtonSchulz(G + μM)
        W ← W − η(0.2·√max(A, B)·O + λW)

    Its `split` is the number of matrices fused along A, 2 for a `gate_up_proj`; they count as separate matrices.
    A group with `muon=False` follows `torch.optim.AdamW`. `param_groups` makes these groups from a model.

    `lr` and `momentum` are read from the group at each step, so schedules set them there. Parameters without a gradient
    are skipped. The state has the parameters' dtype, at least fp32, so that `state_dict` resumes bit for bit.

    Raises:
        UserError: a setting is out of range, or a parameter does not fit its group.
    """

    def __init__(
        self,
        params,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        newton_schulz_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            params,
            {
                "muon": True,
                "split": 1,
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
                "newton_schulz_dtype": newton_schulz_dtype,
                "fused": True,  # so that load_state_dict moves the step counters to the parameters' device
            },
        )

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_settings(group)
        for p in group["params"]:
            _check_parameter(p, group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise UserError("MuonClip: a gradient is sparse (build the embedding with sparse=False)")
            if params:
                step = self._step_muon if group["muon"] else self._step_adamw
                step(group, params, [p.grad for p in params])
        return loss

    def _step_muon(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        for part in self._parts(params, grads, momenta):
            self._step_part(group, *part)

    def _parts(self, *tensors: list[Tensor]) -> Iterable[Iterable[list[Tensor]]]:
        """Cut parameters, their gradients and momenta into parts for `_step_part`, which on a CPU fit its caches."""
        return [tensors] if tensors[0][0].device.type != "cpu" else _cut(*tensors)

    def _step_part(self, group: dict, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        updates = nesterov(momenta, grads, group["momentum"])
        dtype = group["newton_schulz_dtype"] or _fast_dtype(params[0].device)
        directions = self._orthogonalise(updates, group["split"], dtype)
        longest = [max(p.size(-2) // group["split"], p.size(-1)) for p in params]
        scales = [-group["lr"] * UPDATE_RMS * math.sqrt(size) for size in longest]
        descend(params, directions, 1 - group["lr"] * group["weight_decay"], scales)

    def _orthogonalise(self, updates: list[Tensor], split: int, dtype: torch.dtype) -> list[Tensor]:
        """Apply `newton_schulz` to every matrix in `updates`, matrices of equal shape in one stack.

        Returns:
            a direction for each update, of the same shape.
        """
        batches, directions = defaultdict(list), {}
        for i, update in enumerate(updates):
            matrices = update.reshape(-1, update.size(-2) // split, update.size(-1))
            batches[update.device, update.dtype, matrices.shape[1:]].append((i, matrices))
        for batch in batches.values():
            stack = torch.cat([matrices for _, matrices in batch])
            done = newton_schulz(stack, dtype).split([len(matrices) for _, matrices in batch])
            directions |= {i: part.reshape(updates[i].shape) for (i, _), part in zip(batch, done, strict=True)}
        return [directions[i] for i in range(len(updates))]

    def _step_adamw(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in params]
        adamw(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _cut(*tensors: list[Tensor]) -> Iterator[Iterable[list[Tensor]]]:
    """Yield parts of several lists of equal shapes. Each has about `CACHED_NUMBERS` numbers in each list: matrices, and
    views of a few matrices of a stack, those of equal shape together.
    """
    pieces = []  # of a parameter, its gradient and its momentum: a matrix, or views of a few matrices of a stack
    for same in zip(*tensors, strict=True):
        parameter = same[0]
        rows = max(1, CACHED_NUMBERS // parameter[0].numel()) if parameter.ndim == 3 else len(parameter)
        pieces += zip(*(tensor.split(rows) for tensor in same), strict=True)
    pieces.sort(key=lambda piece: piece[0].shape)
    ends = accumulate(piece[0].numel() for piece in pieces)
    numbered = zip((end // CACHED_NUMBERS for end in ends), pieces, strict=True)  # by the part they belong to
    for _, part in groupby(numbered, itemgetter(0)):
        yield zip(*(piece for _, piece in part), strict=True)


def _check_settings(group: dict) -> None:
    for name in ("lr", "weight_decay", "eps"):
        if not 0 <= group[name] < math.inf:
            raise UserError(f"MuonClip: {name} {group[name]} is out of range (give a number of at least 0)")
    for name, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise UserError(f"MuonClip: {name} {value} is out of range (give a number from 0 to below 1)")


def _check_parameter(p: Tensor, group: dict) -> None:
    shape = tuple(p.shape)
    if p.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"MuonClip: a parameter of shape {shape} is {p.dtype} (keep the weights in float32, compute under autocast)"
        )
    if group["muon"] and p.ndim not in (2, 3):
        raise UserError(f"MuonClip: Muon takes 2-D and 3-D weights, not shape {shape} (use param_groups(model))")
    if group["muon"] and p.size(-2) % group["split"]:
        raise UserError(
            f"MuonClip: split {group['split']} does not divide the rows of a weight of shape {shape} (give the number "
            "of matrices fused along its rows)"
        )


def param_groups(
    model: nn.Module, lr: float = 3e-4, weight_decay: float = 0.1, muon: bool = True, embedding_lr: float = 1.0
) -> list[dict]:
    """Sort a model's trainable parameters into MuonClip's groups, each parameter into exactly one group.

    Muon gets every 2-D weight except embeddings and the head (the router too, as in Moonlight), and the 3-D stacks of a
    module named `experts`, where a fused `gate_up_proj` counts as two matrices. AdamW gets all others. Embeddings,
    their convolution and 1-D parameters have no weight decay. With `muon=False` AdamW gets Muon's weights too.

    A module inside `torch.compile` or peft's `modules_to_save` is sorted as it would be without that wrapper. peft's
    adapters of an embedding count as embeddings.

    The rate of embeddings and their convolution is `embedding_lr` times `lr`. A token's row gets a gradient only where
    the token occurs, so it takes larger steps than weights that every token moves; a short run depends on it.
    """
    matrices, fused, adamw_decay, adamw_plain, embeddings, seen = [], [], [], [], [], set()
    for module_name, module in model.named_modules():
        leaf = WRAPPERS.sub("", module_name).rpartition(".")[2]
        is_embedding = isinstance(module, nn.Embedding) or leaf in EMBEDDINGS
        is_head = leaf in ("lm_head", "head")
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad or p in seen:
                continue
            seen.add(p)
            if (p.ndim == 2 and not is_embedding and not is_head) or (p.ndim == 3 and leaf == "experts"):
                group = fused if "gate_up_proj" in (leaf, name) else matrices
            elif is_embedding and embedding_lr != 1:
                group = embeddings
            elif is_embedding or p.ndim < 2:
                group = adamw_plain
            else:
                group = adamw_decay
            group.append(p)
    groups = [
        {"params": matrices, "muon": muon, "split": 1, "weight_decay": weight_decay},
        {"params": fused, "muon": muon, "split": 2, "weight_decay": weight_decay},
        {"params": adamw_decay, "muon": False, "weight_decay": weight_decay},
        {"params": adamw_plain, "muon": False, "weight_decay": 0.0},
        {"params": embeddings, "muon": False, "weight_decay": 0.0, "lr": lr * embedding_lr},
    ]
    return [{"lr": lr} | group for group in groups if group["params"]]
