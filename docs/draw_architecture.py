"""Draws the architecture from a preset's configuration: `python docs/draw_architecture.py [PRESET OUT]`.

The pictures of two presets go to docs/, or one preset's to OUT (.svg or .png). Every number in them comes from the
configuration, and the widths of latents and heads are drawn to scale, so the picture changes with the model.
"""

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon

from moonwhale.costs import model_size
from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
from moonwhale.presets import get_preset

PICTURES = {  # the second is sparser: a token uses 6 of 32 experts, and reads 8 of 32 blocks
    "seed_190m": Path(__file__).with_name("architecture.svg"),
    "large": Path(__file__).with_name("architecture_large.svg"),
}
WIDTH, HEIGHT = 10.0, 10.3  # inches, which are also the units of the axes

INK, GRAY, LIGHT, PALE = "#1f2937", "#6b7280", "#e5e7eb", "#f3f4f6"
BLUE, AMBER, GREEN, PINK, VIOLET = "#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed"
FILL = {BLUE: "#dbeafe", AMBER: "#fef3c7", GREEN: "#d1fae5", PINK: "#fce7f3", VIOLET: "#ede9fe", GRAY: PALE}


class Sheet:
    """A page for boxes, text and arrows. Coordinates are inches from its lower left corner."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="none")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")
        self.box(
            0.02, 0.02, WIDTH - 0.04, HEIGHT - 0.04, color=LIGHT, fill="white"
        )  # a white background, also on dark pages

    def box(self, x, y, w, h, text="", color=GRAY, dashed=False, size=9.0, fill=None):
        style = f"round,pad=0,rounding_size={min(0.07, w / 3, h / 3)}"
        patch = FancyBboxPatch((x, y), w, h, style, facecolor=fill or FILL[color], edgecolor=color, linewidth=1.0)
        patch.set_linestyle((0, (3, 2)) if dashed else "solid")
        self.axes.add_patch(patch)
        if text:
            self.text(x + w / 2, y + h / 2, text, size, va="center")

    def text(self, x, y, text, size=9.0, color=INK, ha="center", va="baseline", weight="normal", rotation=0):
        style = {"fontsize": size, "color": color, "fontweight": weight, "rotation": rotation, "ha": ha, "va": va}
        lines, step = text.split("\n"), 1.35 * size / 72  # points to inches
        y += step * (len(lines) - 1) * (0.5 if va == "center" else 1)
        for i, line in enumerate(lines):  # line by line, so that each is centred in any font
            self.axes.text(x, y - i * step, line, **style)

    def arrow(self, *points, color=GRAY):
        """Draws straight lines through all points, with an arrow head at the last."""
        xs, ys = zip(*points, strict=True)
        style = {"color": color, "linewidth": 1.1}
        self.axes.plot(xs[:-1], ys[:-1], **style, solid_joinstyle="round")
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9, **style}
        self.axes.annotate("", points[-1], points[-2], arrowprops=head)

    def card(self, x, y, w, h, title, color, note=""):
        self.box(x, y, w, h, color=LIGHT, fill="white")
        self.text(x + 0.16, y + h - 0.27, title, 10.5, color, ha="left", weight="bold")
        if note:
            self.text(x + 0.16, y + h - 0.48, note, 8.6, GRAY, ha="left")


def millions(number: int) -> str:
    """Formats a number in millions with three digits."""
    number /= 1e6
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} M"


def draw(config, name: str) -> Sheet:
    """Draws the model of a configuration."""
    sheet, size = Sheet(), model_size(config)
    blocks = size.parameters - size.embedding - size.head - size.mtp
    total = f"{millions(size.parameters)} parameters, of which a token uses {millions(size.active_parameters)}"
    parts = {"embedding": size.embedding, "head": size.head}
    parts |= {f"{config.num_hidden_layers} blocks": blocks, "MTP modules": size.mtp}
    parts = " · ".join(f"{part} {millions(count)}" for part, count in parts.items() if count)
    sheet.text(0.4, 9.8, f"moonwhale {name}", 16, ha="left", weight="bold")
    sheet.text(WIDTH - 0.4, 9.95, total, 10.5, ha="right")
    sheet.text(WIDTH - 0.4, 9.73, parts, 8.8, GRAY, ha="right")
    _chain(sheet, config)

    block = f"{millions(size.parameters_per_block)} parameters, {millions(size.active_parameters_per_block)} active"
    around = "a norm before, and a residual around, attention and experts"
    sheet.text(0.4, 4.37, f"Inside a block: {block}; {around}", 10, ha="left")
    _latent_attention(sheet, config, 0.4, 0.25, 3.4, 3.95)
    _block_attention(sheet, config, 3.95, 0.25, 2.7, 3.95)
    _experts(sheet, config, 6.8, 0.25, 2.8, 3.95)
    return sheet


# The main model and the chain of MTP modules behind it


def _chain(sheet: Sheet, config) -> None:
    modules, margin, width, gap = len(config.mtp_blocks), 0.75, 2.55, 0.62
    bottom, top = 5.15, 8.95  # y of the embeddings and of the heads
    row, norm, space, join = 0.34, 0.24, 0.14, 0.5  # heights of the boxes, and the space between them
    sheet.box(0.4, 4.75, WIDTH - 0.8, 4.82, color=LIGHT, fill="#f9fafb")

    first, norm_y = bottom + row + 2 * space, top - row - norm - 1.3 * space
    step = min(0.42, (norm_y - 2 * space - first) / config.num_hidden_layers)
    narrow = min(width, (WIDTH - 0.75 - margin - width) / max(modules, 1) - gap)
    x, index, hidden = margin, 0, None  # hidden: where the arrow from the previous column starts
    for k, blocks in enumerate([config.num_hidden_layers, *config.mtp_blocks]):
        w = narrow if k else width
        middle, y = x + w / 2, first
        title = (f"MTP module {k}", VIOLET) if k else ("main model", INK)
        sheet.text(middle, top + 0.34, title[0], 10.5, title[1], weight="bold")
        sheet.text(middle, top + 0.12, f"predicts token i + {k + 1}", 8.8, GRAY)
        sheet.text(middle, bottom - 0.2, f"token i + {k}" if k else "token i", 8.8, GRAY)
        embedding = "shared embedding" if k else f"embedding  {config.vocab_size:,} × {config.hidden_size}"
        if config.embedding_conv and not k:
            embedding += f"\nand a convolution over {config.embedding_conv} tokens"
        head = "shared head" if k else f"head  {config.hidden_size} × {config.vocab_size:,}"
        tied = config.tie_word_embeddings and k == 0
        sheet.box(x, bottom, w, row, embedding, GREEN, dashed=k > 0, size=8 if "\n" in embedding else 9)
        sheet.box(x, top - row, w, row, "head, tied to the embedding" if tied else head, GREEN, dashed=tied or k > 0)
        sheet.arrow((middle, bottom + row), (middle, first))
        if k:
            widths = f"{2 * config.hidden_size} → {config.hidden_size}"
            sheet.box(x, y, w, join, f"norm both, project\n{widths}", VIOLET, size=8.8)
            turn = x - 0.62 * gap
            sheet.arrow(hidden, (turn, hidden[1]), (turn, y + join / 2), (x, y + join / 2), color=VIOLET)
            sheet.arrow((middle, y + join), (middle, y + join + space))
            y += join + space
        for i in range(blocks):
            _bar(sheet, config, index + i, x, y + i * step, w, step - 0.06)
        sheet.arrow((middle, y + blocks * step - 0.06), (middle, norm_y))
        sheet.box(x, norm_y, w, norm, "norm", GRAY, size=8.6)
        sheet.arrow((middle, norm_y + norm), (middle, top - row))
        hidden = x + w, norm_y + norm / 2
        index, x = index + blocks, x + w + gap


def _bar(sheet: Sheet, config, index: int, x, y, w, h) -> None:
    """Draws one block: its attention and its feed-forward network or experts."""
    moba, size = config.is_moba_layer(index), 8.6 if h > 0.2 else 7.2
    follows = f"{config.num_experts_per_tok} of {config.n_routed_experts} + {config.n_shared_experts} experts"
    if index < config.first_k_dense_replace:
        follows = "dense network"
    sheet.box(
        x, y, w * 0.45, h, "MLA, MoBA" if moba else "MLA, full", BLUE, size=size, fill=None if moba else "#bfdbfe"
    )
    sheet.box(x + w * 0.47, y, w * 0.53, h, follows, AMBER, size=size)
    sheet.text(x - 0.08, y + h / 2, str(index), 8.4, GRAY, ha="right", va="center")


# The three parts of a block


def _latent_attention(sheet: Sheet, config, x, y, w, h) -> None:
    heads, rope, value = config.num_attention_heads, config.qk_rope_head_dim, config.v_head_dim
    nope = config.qk_nope_head_dim
    rank, q_rank, hidden = config.kv_lora_rank, config.q_lora_rank, config.hidden_size
    sheet.card(x, y, w, h, "Multi-head latent attention", BLUE, f"{heads} heads; widths to scale, RoPE on violet")
    left, inner, bar = x + 0.18, w - 0.36, 0.27
    low, mid, high, out = y + 0.66, y + 1.27, y + 2.06, y + 2.85

    unit = min(
        inner / hidden, (inner - 0.4) / ((q_rank or 0) + rank + rope)
    )  # inches per value, for vectors of a whole token
    sheet.box(left, low, hidden * unit, bar, f"hidden  {hidden}", GRAY)
    widths = [(q_rank or 0) * unit, rank * unit, rope * unit]
    space = (inner - sum(widths)) / 2
    begins = [left, left + widths[0] + space, left + inner - widths[2]]
    labels = [f"query latent  {q_rank}", f"{rank}", f"{rope}" if rope * unit > 0.25 else ""]
    for begin, width, label, color in zip(begins, widths, labels, (BLUE, PINK, PINK), strict=True):
        if width:
            sheet.box(begin, mid, width, bar, label, color, size=8.8 if width < 1.6 else 9)
            from_hidden = min(begin + width / 2, left + hidden * unit - 0.06)
            sheet.arrow((from_hidden, low + bar), (begin + width / 2, mid))
    if not labels[2]:
        sheet.text(begins[2] - 0.05, mid + bar / 2, str(rope), 8.8, PINK, ha="right", va="center")

    unit = (inner - 0.75) / (2 * (nope + rope) + value)  # inches per value, for vectors of one head
    queries, values = left, left + (nope + rope) * unit + 0.34
    keys = left + inner - 0.07 - (nope + rope) * unit
    for depth in (0.07, 0.035, 0.0):  # other heads behind the first
        text = "{}".format if depth == 0 else lambda _: ""
        for begin in (queries, keys):
            sheet.box(begin + depth, high + depth, nope * unit, bar, text(nope), BLUE)
            sheet.box(begin + depth + nope * unit, high + depth, rope * unit, bar, text(rope), VIOLET, size=8.6)
        sheet.box(values + depth, high + depth, value * unit, bar, text(value), BLUE)
    ends = [queries + (nope + rope) * unit / 2, values + value * unit / 2, keys + nope * unit / 2]
    for label, middle in zip(("query", "value", "key"), [*ends[:2], keys + (nope + rope) * unit / 2], strict=True):
        sheet.text(middle, high + bar + 0.13, f"{label} × {heads}", 8.6, GRAY)
        sheet.arrow((middle, high + bar + 0.3), (middle, out))
    from_queries = (left + widths[0] / 2, mid + bar) if q_rank else (ends[0], low + bar)
    latent = begins[1] + widths[1] / 2, mid + bar
    sheet.arrow(from_queries, (ends[0], high))
    sheet.arrow(latent, (ends[1], high))
    sheet.arrow(latent, (ends[2], high))
    sheet.arrow((begins[2] + widths[2] / 2, mid + bar), (keys + (nope + rope / 2) * unit, high), color=VIOLET)

    scores = f"softmax(query · key / √{nope + rope}) · value"
    sheet.box(left, out, inner, 0.46, f"{scores}\n{heads} × {value} → {hidden}", BLUE, size=8.8)
    numbers = f"cached: {rank} + {rope} = {config.kv_cache_numbers_per_token} numbers a token"
    sheet.text(
        x + w / 2, y + 0.16, f"{numbers},\nwhere all keys and values are {heads * (nope + rope + value):,}", 8.6, PINK
    )


def _block_attention(sheet: Sheet, config, x, y, w, h) -> None:
    size, topk, context = config.moba_block_size, config.moba_topk, config.max_position_embeddings
    note = f"{topk} blocks of {size} keys, one its own" if topk else "off: full attention"
    sheet.card(x, y, w, h, "Mixture of block attention", VIOLET, note)
    blocks = -(-context // size)
    side, left, bottom = w - 0.55, x + 0.36, y + 0.92
    rows = -(-32 // blocks)  # queries drawn per block
    cell, line, top = side / blocks, side / blocks / rows, bottom + side

    def paint(points, color):
        sheet.axes.add_patch(Polygon(points, facecolor=color, edgecolor="white", linewidth=0.6))

    for query in range(blocks * rows):
        own, down = query // rows, top - query * line
        gates = [(i * 37 + query * 23) % 61 for i in range(own)]  # an arbitrary example
        best = sorted(range(own), key=gates.__getitem__)[: topk - 1] if topk else range(own)
        for i in range(own):
            a, b = left + i * cell, left + (i + 1) * cell
            paint([(a, down), (b, down), (b, down - line), (a, down - line)], "#c4b5fd" if i in best else PALE)
    for own in range(blocks):
        a, b = left + own * cell, top - own * cell
        paint([(a, b), (a, b - cell), (a + cell, b - cell)], VIOLET)
    sheet.text(left + side / 2, bottom - 0.2, f"keys: {context:,} in {blocks} blocks", 8.6, GRAY)
    sheet.text(left - 0.14, bottom + side / 2, "queries", 8.6, GRAY, va="center", rotation=90)
    sheet.text(left + 0.7 * side, bottom + 0.8 * side, "own block,\ncausal", 8.6, VIOLET)
    sheet.text(
        x + w / 2, y + 0.16, "each query of each head chooses by\nits product with a block's mean key", 8.6, VIOLET
    )


def _experts(sheet: Sheet, config, x, y, w, h) -> None:
    experts, chosen, shared = config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts
    inside = config.moe_intermediate_size
    sheet.card(x, y, w, h, "DeepSeekMoE", AMBER, f"{experts} routed experts of {inside}, {chosen} chosen")
    left, inner = x + 0.18, w - 0.36
    low, router, bank, total = y + 0.66, y + 1.2, y + 1.94, y + 2.99
    shared_width = 0.66 if shared else 0.0
    routed = inner - 1.25 * shared_width
    middle = left + routed / 2
    sheet.box(left, low, inner, 0.27, f"hidden  {config.hidden_size}", GRAY)
    sheet.box(left, router, routed, 0.46, f"{config.scoring_func} router\nscore + bias chooses", AMBER, size=8.8)
    sheet.box(left, total, inner, 0.32, "Σ gate · expert" + (" + shared" if shared else ""), AMBER)

    lines = max(2, -(-experts // 8))
    columns = -(-experts // lines)
    across, tall = routed / columns, min(0.3, 0.8 / lines)
    picked = {i * experts // chosen for i in range(chosen)}  # an arbitrary example
    for i in range(experts):
        at = left + i % columns * across + 0.02, bank + (lines - 1 - i // columns) * tall + 0.02
        color, fill = (AMBER, FILL[AMBER]) if i in picked else ("#d1d5db", "white")
        sheet.box(*at, across - 0.04, tall - 0.04, str(i), color, fill=fill, size=8 if tall > 0.2 else 7)
    for start, end in ((low + 0.27, router), (router + 0.46, bank), (bank + lines * tall, total)):
        sheet.arrow((middle, start), (middle, end))
    if shared:
        begin, high = left + inner - shared_width, bank + lines * tall
        text = f"{shared}\nshared\nof {inside}"
        sheet.box(begin, router, shared_width, high - router, text, AMBER, fill="#fde68a", size=8.8)
        for start, end in ((low + 0.27, router), (high, total)):
            sheet.arrow((begin + shared_width / 2, start), (begin + shared_width / 2, end))
    sheet.text(x + w / 2, y + 0.16, "after each step\nbias += γ · sign(mean load − load)", 8.6, AMBER)


def configuration(name: str) -> MoonwhaleConfig:
    """Returns the configuration of a preset, with its context as the longest position."""
    preset = get_preset(name)
    return MoonwhaleConfig(**{"max_position_embeddings": preset.train["context"]} | preset.model)


STYLE = {
    "svg.hashsalt": "moonwhale",  # the same ids each time
    "svg.fonttype": "none",  # text stays text, so that readers can search it and tests can read it
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # the second has the same widths
}


def save(config, name: str, path: Path) -> None:
    """Draws a model into an .svg or a .png file. Equal models give equal bytes in an .svg."""
    with rc_context(STYLE):
        figure = draw(config, name).figure
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main(pictures: dict[str, Path]) -> None:
    for name, path in pictures.items():
        save(configuration(name), name, path)


if __name__ == "__main__":
    main({sys.argv[1]: Path(sys.argv[2])} if len(sys.argv) == 3 else PICTURES)
