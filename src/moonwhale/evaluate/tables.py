"""The results of an evaluation, for people."""

WIDTH = 80  # characters of a text


def show_text(source: str, part: str, found: dict) -> None:
    first, *others = (f"{share:.1%}" for share in found["accuracies"])
    mtp = ", ".join(f"{loss:.3f}" for loss in found["losses"][1:])
    size = f"{found['rows']:,} rows of {found['context']:,} tokens, {found['targets']:,} predicted"
    _show("text", f"{source}, {part}: {size}, {found['bytes']:,} bytes")
    _show("", f"{found['bits_per_byte']:.4f} bits per byte")
    _show("", f"loss {found['losses'][0]:.4f} nats, perplexity {found['perplexity']:.2f}, of a token")
    _show("", f"next token right {first}")
    if others:
        _show("", f"MTP modules right {', '.join(others)}; their losses {mtp}")


def show_drafts(what: str, found: dict) -> None:
    _show(
        "drafts", f"on {what}: {found['tokens_per_forward']:.3f} tokens a forward, of {found['tokens']:,} greedy ones"
    )
    _show("", f"guesses that held, by depth: {', '.join(f'{share:.1%}' for share in found['acceptance']) or 'none'}")


def show_answers(name: str, temperature: float, found: dict) -> None:
    size = f"{found['problems']:,} problems, {found['samples']} samples of each at temperature {temperature:g}"
    _show("task", f"{name}: {size}")
    for label, (mean, error) in [("greedy", found["greedy"]), *((f"pass@{k}", v) for k, v in found["pass_at"].items())]:
        _show("", f"{label:<9}{mean:6.1%} ± {error:.1%}")
    _show("", f"samples: {found['well_formed']:.1%} well-formed, {found['cut_off']:.1%} cut off")
    _show("", f"mean length of a sample: {found['mean_tokens']:.1f} tokens")
    for example in found["examples"]:
        _show("", f"{'right' if example['score'] == 1 else 'wrong':<9}{_short(example['question'])}")
        _show("", f"{'':<9}{_short(example['answer'])} wanted, greedy answer {_short(example['completion'])}")


def show_harness(found: dict[str, dict]) -> None:
    for name, figures in found.items():
        examples = f" ({figures['examples']:,} examples)" if "examples" in figures else ""
        _show("lm-eval", name + examples)
        for metric, value in figures.items():
            if metric != "examples" and not metric.endswith(" stderr"):
                error = figures.get(f"{metric} stderr")
                _show("", f"{metric:<16}{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))


def _show(label: str, text: str) -> None:
    print(f"{label:<12}{text}", flush=True)


def _short(text: str) -> str:
    """On one line, as a Python string, its middle left out where it is long."""
    text = repr(text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2]} … {text[-WIDTH // 2 :]}"
