"""Prints the results of an evaluation as text."""

LABEL_WIDTH = 12
EXCERPT_WIDTH = 80


def show_text(source: str, part: str, results: dict) -> None:
    accuracy, *mtp_accuracies = (f"{share:.1%}" for share in results["accuracies"])
    mtp_losses = ", ".join(f"{loss:.3f}" for loss in results["losses"][1:])
    size = f"{results['rows']:,} rows of {results['context']:,} tokens, {results['targets']:,} predicted"
    _show("text", f"{source}, {part}: {size}, {results['bytes']:,} bytes")
    _show("", f"{results['bits_per_byte']:.4f} bits per byte")
    _show("", f"loss {results['losses'][0]:.4f} nats, perplexity {results['perplexity']:.2f}, per token")
    _show("", f"next token right {accuracy}")
    if mtp_accuracies:
        _show("", f"MTP modules right {', '.join(mtp_accuracies)}; their losses {mtp_losses}")


def show_drafts(what: str, results: dict) -> None:
    acceptance = ", ".join(f"{share:.1%}" for share in results["acceptance"]) or "none"
    _show(
        "drafts",
        f"on {what}: {results['tokens_per_forward']:.3f} tokens per forward, for {results['tokens']:,} greedy tokens",
    )
    _show("", f"drafts accepted, by depth: {acceptance}")


def show_task(name: str, temperature: float, results: dict) -> None:
    size = f"{results['problems']:,} problems, {results['samples']} samples of each at temperature {temperature:g}"
    _show("task", f"{name}: {size}")
    rates = {"greedy": results["greedy"]} | {f"pass@{k}": rate for k, rate in results["pass_at"].items()}
    for label, (mean, error) in rates.items():
        _show("", f"{label:<9}{mean:6.1%} ± {error:.1%}")
    _show("", f"samples: {results['well_formed']:.1%} well-formed, {results['cut_off']:.1%} cut off")
    if results["over_limit"]:
        _show("", f"{results['over_limit']:,} answers count as wrong: scoring them takes too long or too much memory")
    _show("", f"mean length of a sample: {results['mean_tokens']:.1f} tokens")
    for example in results["examples"]:
        _show("", f"{'right' if example['score'] == 1 else 'wrong':<9}{_excerpt(example['question'])}")
        answer, completion = _excerpt(example["answer"]), _excerpt(example["completion"])
        _show("", f"{'':<9}expected {answer}, greedy answer {completion}")


def show_harness(results: dict[str, dict]) -> None:
    for name, figures in results.items():
        examples = f" ({figures['examples']:,} examples)" if "examples" in figures else ""
        _show("lm-eval", name + examples)
        for metric, value in figures.items():
            if metric != "examples" and not metric.endswith(" stderr"):
                error = figures.get(f"{metric} stderr")
                _show("", f"{metric:<16}{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))


def _show(label: str, text: str) -> None:
    print(f"{label:<{LABEL_WIDTH}}{text}", flush=True)


def _excerpt(text: str) -> str:
    """Returns the text as a Python string on one line, without its middle if it is long."""
    text = repr(text)
    half = EXCERPT_WIDTH // 2
    return text if len(text) <= EXCERPT_WIDTH else f"{text[:half]} … {text[-half:]}"
