"""The documents are correct: links resolve, snippets run, tests exist, and figures are current."""

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moonwhale.serve.app import create_app
from serving import Running

ROOT = Path(__file__).parent.parent
PAGES = "*.md", "docs/*.md", "models/*/*.md", "notebooks/*.md"
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern))


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """Returns the contents of all code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def script(path: str):
    """Loads a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(document: str, text: str) -> list[str]:
    """Returns the links to files or headings that do not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        whole = text if not name else path.read_text(encoding="utf-8") if anchor and path.is_file() else ""
        if not path.exists() or (anchor and anchor not in anchors(whole)):
            found.append(target)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    assert not broken(document, read(document))


def test_a_broken_link_is_detected():
    text = "# A title\n[a](nowhere.md) [b](#a-title) [c](#another) [d](../README.md) [e](training.md#nothing)"
    assert broken("docs/mechanisms.md", text) == ["nowhere.md", "#another", "training.md#nothing"]


def test_links_of_notebooks_resolve():
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert not broken(path.relative_to(ROOT).as_posix(), text)


# --- snippets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, draw):
    """Returns the folder in which snippets run. Its `runs/demo` is the checkpoint of a tiny, untrained model."""
    from moonwhale.data.tokenizer import train_tokenizer
    from moonwhale.model import MoonwhaleForCausalLM

    folder = tmp_path_factory.mktemp("snippets")
    tokenizer = train_tokenizer(["a whale under the moon"], 320)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = draw(MoonwhaleForCausalLM(tiny_config(vocab_size=len(tokenizer), **ids)))
    for name in ("demo", "evening"):
        model.save_pretrained(folder / "runs" / name)
        tokenizer.save_pretrained(folder / "runs" / name)
        (folder / "runs" / name / "run.yaml").touch()
    return folder


SERVER = "http://127.0.0.1:8000"  # where snippets expect `moonwhale serve`
SNIPPETS = [(document, block) for document in DOCUMENTS for block in fenced(read(document), "python")]
ALONE = [(document, block) for document, block in SNIPPETS if SERVER not in block]


@pytest.mark.parametrize(("document", "snippet"), ALONE, ids=[document for document, _ in ALONE])
def test_snippets_run(document, snippet, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOONWHALE_CACHE", str(folder / "cache"))
    exec(compile(snippet, document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_snippets_that_ask_a_server_run(small_engine, small_checkpoint, capsys):
    snippets = [block for _, block in SNIPPETS if SERVER in block]
    assert snippets
    with Running(create_app(small_engine(), "demo", small_checkpoint)) as server:
        for snippet in snippets:
            exec(snippet.replace(SERVER, server.url), {})
            assert capsys.readouterr().out.strip()


def test_the_training_loop_in_the_snippet_learns(capsys):
    (snippet,) = [block for block in fenced(read("docs/training.md"), "python") if "attach_hooks" in block]
    exec(snippet, {})
    losses = [float(loss) for loss in re.findall(r"main ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < 0.9 * losses[0]


# --- tests that the documents name -----------------------------------------------------------------------------------


def test_named_tests_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+)`", read(document))}
    assert named
    assert not [name for name in named if f"def {name}(" not in sources]


def test_a_path_that_no_gpu_has_run_names_the_test_that_emulates_it():
    rows = [line for line in read("docs/precision.md").splitlines() if line.startswith("|") and "| never run |" in line]
    assert len(rows) >= 8
    for row in rows:
        targets = re.findall(r"\]\(\.\./(tests/[^)]*)\)", row)
        assert targets and all((ROOT / target).exists() for target in targets), row


def test_thresholds_are_called_guesses_until_they_are_measured():
    from moonwhale.model import thresholds

    assert ("which are guesses until then | not measured" in read("docs/precision.md")) == (not thresholds.MEASURED_ON)
    if thresholds.MEASURED_ON:
        assert re.fullmatch(r".+, \d{4}-\d\d-\d\d", thresholds.MEASURED_ON)


# --- the picture of the architecture ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawing():
    return script("docs/draw_architecture.py")


def words(svg: Path) -> list[str]:
    """Returns all text of a picture, in drawing order."""
    return [text.text for text in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("preset", ["seed_190m", "large"])
def test_the_pictures_are_up_to_date(preset, drawing, tmp_path):
    assert drawing.PICTURES.keys() == {"seed_190m", "large"}
    now, kept = tmp_path / "now.svg", drawing.PICTURES[preset]
    drawing.main({preset: now})
    assert words(now) == words(kept)
    versions = [re.search("Matplotlib v([^,]+)", path.read_text())[1] for path in (now, kept)]
    if versions[0] == versions[1]:  # other versions of Matplotlib may write the same lines differently
        assert now.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("preset", ["seed_190m", "large"])
def test_the_pictures_show_the_computed_counts(preset, drawing):
    from moonwhale.costs import model_size

    config = drawing.configuration(preset)
    size, shown = model_size(config), "\n".join(words(drawing.PICTURES[preset]))
    for number in (
        f"{size.parameters / 1e6:.0f} M parameters",
        f"uses {size.active_parameters / 1e6:.0f} M",
        f"{drawing.millions(size.parameters_per_block)} parameters, ",
        f"{drawing.millions(size.active_parameters_per_block)} active",
        f"= {config.kv_cache_numbers_per_token} numbers a token",
        f"{config.moba_topk} blocks of {config.moba_block_size} keys",
        f"{config.n_routed_experts} routed experts of {config.moe_intermediate_size}",
    ):
        assert number in shown, number


@pytest.mark.parametrize(
    "changed",
    [
        {"q_lora_rank": 256},
        {"moba_topk": 2},
        {"moba_full_attention_layers": [3]},
        {"num_experts_per_tok": 4},
        {"mtp_num_blocks": [1, 2]},
        {"num_nextn_predict_layers": 0},
        {"vocab_size": 50_000},
        {"embedding_conv": 3},
    ],
    ids=str,
)
def test_the_picture_changes_with_the_configuration(changed, drawing, tmp_path):
    config = drawing.configuration("seed_190m")
    drawing.save(type(config)(**config.to_dict() | changed), "seed_190m", tmp_path / "other.svg")
    assert words(tmp_path / "other.svg") != words(drawing.PICTURES["seed_190m"])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_nextn_predict_layers": 0, "moba_topk": 0},
        {"num_nextn_predict_layers": 3, "q_lora_rank": None, "n_shared_experts": 0},
        {"num_hidden_layers": 16, "n_routed_experts": 64, "first_k_dense_replace": 2, "tie_word_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["demo", "large"])
def test_any_configuration_can_be_drawn(preset, changed, drawing):
    """Any configuration can be drawn, and all text stays on the page."""
    config = drawing.configuration(preset)
    figure = drawing.draw(type(config)(**config.to_dict() | changed), preset).figure
    figure.canvas.draw()
    page = figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()


def test_the_curves_end_at_the_figures_of_the_transcripts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, drawn = script("docs/draw_learning.py"), tmp_path / "learning.svg"
    runs = json.loads(read("docs/learning.json"))
    module.draw(runs, drawn)
    comments = [re.findall("<!-- (.*?) -->", path.read_text()) for path in (drawn, ROOT / "docs" / "learning.svg")]
    assert comments[0] == comments[1]
    for name, run in runs.items():
        (bits,) = set(re.findall(r"([\d.]+) bits per byte", read(f"docs/{name}.txt")))
        assert f"{name}: {bits}" in comments[0] and f"{run['held_out'][-1][1]:.3f}" == bits


def test_curves_of_a_log():
    history = [
        {"step": 1, "loss_main": 6.0},
        {"step": 2, "loss_main": 3.0},
        {"step": 2, "eval_loss_main": 4.0, "eval_bits_per_byte": 2.0},
    ]
    assert script("docs/draw_learning.py").curves(history, 100) == {
        "train": [[100, 3.0], [200, 1.5]],
        "held_out": [[200, 2.0]],
    }


# --- the README's figures --------------------------------------------------------------------------------------------


def test_the_readme_shows_the_results():
    assert script("docs/update_readme.py").updated(read("README.md")) == read("README.md")
