"""Mutators that make a good checkpoint folder hostile. Each draws from a seeded generator."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"  # what only executed code would write
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ODD = [None, True, -1, 0, 1, 7, 1e308, float("nan"), float("inf"), 10**9, 2**31, 2**63, 10**30, "x", "", "\x1b[2J"]
ODD += [[], {}]
ODD += [[1], ["x"], {"x": 1}, [[[[1]]]], "a" * 5000, 10**4000]


class Folder:
    """A copy of the good checkpoint, and ways to change its files."""

    def __init__(self, path: Path, draw: random.Random):
        self.path, self.draw = path, draw

    def odd(self) -> object:
        return self.draw.choice(ODD)

    def edit(self, name: str, change: Callable[[dict], object]) -> None:
        values = json.loads((self.path / name).read_text(encoding="utf-8"))
        change(values)
        (self.path / name).write_text(json.dumps(values), encoding="utf-8")

    def header(self, change: Callable[[dict], object]) -> None:
        """Change the header of the weights."""
        content = (self.path / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        values = json.loads(content[8 : 8 + length])
        change(values)
        header = json.dumps(values).encode()
        (self.path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])

    def replace(self, name: str) -> None:
        """Put something in a file's place that is no plain file, or is no text, or is large."""
        path, kind = (
            self.path / name,
            self.draw.choice(["pipe", "device", "folder", "broken", "bytes", "empty", "large"]),
        )
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind in ("device", "broken"):
            path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
        else:
            path.write_bytes(b"" if kind == "empty" else self.draw.randbytes(300))
            if kind == "large":
                os.truncate(path, 1 << 34)  # takes no space on the disk


def set_config(f: Folder) -> None:
    f.edit("config.json", lambda v: v.update({f.draw.choice(sorted(v)): f.odd()}))


def add_config(f: Folder) -> None:
    names = ["forward", "to_dict", "__class__", "__dict__", "_attn_implementation", "attn_implementation", "num_labels"]
    names += ["experts_implementation", "quantization_config", "id2label", "per_layer_config", "fusion_config", "dtype"]
    names += [
        "auto_map",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_weights",
        "attribute_map",
        "x" * 9999,
    ]
    names += ["text_config", "text_encoder", "decoder", "generator", "vision_config", "is_encoder_decoder"]
    names += ["layer_types", "sliding_window", "attention_chunk_size", "output_hidden_states", "output_attentions"]
    implementations = ["flash_attention_2", "paged|sdpa", "sdpa", "batched_mm", "kernels-community/flash-attn"]
    value = f.draw.choice([*ODD, *implementations, {"AutoConfig": "evil.Evil"}, "../evil.bin"])
    f.edit("config.json", lambda v: v.update({f.draw.choice(names): value}))


def enlarge(f: Folder) -> None:
    sizes = ["vocab_size", "num_hidden_layers", "hidden_size", "n_routed_experts", "num_nextn_predict_layers"]
    sizes += ["max_position_embeddings", "moe_intermediate_size", "kv_lora_rank", "moba_topk", "moba_block_size"]
    sizes += ["num_attention_heads", "n_shared_experts", "mtp_num_blocks", "num_labels", "moba_key_conv"]
    f.edit(
        "config.json", lambda v: v.update({f.draw.choice(sizes): f.draw.choice([10**9, 2**20, 9999, 2**31 - 1, 1000])})
    )


def many_blocks(f: Folder) -> None:
    """Describe many blocks, and give the weight file as many tensors, which may be empty and have the right names."""
    from safetensors.torch import load_file, save_file

    number = f.draw.choice([400, 500, 1000, 9999])
    fields = ["num_hidden_layers", "num_nextn_predict_layers", "mtp_num_blocks"]
    f.edit("config.json", lambda v: v.update({f.draw.choice(fields): number}))
    tensors = load_file(f.path / WEIGHTS)
    empty = next(iter(tensors.values())).new_zeros(0)
    name = f.draw.choice(["a{}", "model.layers.{}.a{}", "model.layers.{}.input_layernorm.weight"])
    each = 1 if name.endswith("weight") else 8
    save_file(
        tensors | {name.format(i, j): empty.clone() for i in range(3, number) for j in range(each)},
        f.path / WEIGHTS,
        {"format": "pt"},
    )


def long_lists(f: Folder) -> None:
    names = ["moba_full_attention_layers", "mtp_num_blocks", "eos_token_id", "architectures"]
    value = [f.draw.choice([0, 1])] * f.draw.choice([10**4, 10**6])
    f.edit("config.json", lambda v: v.update({f.draw.choice(names): value, "num_nextn_predict_layers": 400}))


def text_of_config(f: Folder) -> None:
    good = (f.path / "config.json").read_text()
    texts = [good[: len(good) // 2], "[" * 10**6, '{"a":' * 10**5, "NaN", "[]", '"x"', good[:-2] + ', "vocab_size": 5}']
    texts += [
        '{"model_type": "moonwhale", "x": "' + "a" * 10**8 + '"}',
        good.replace("moonwhale", "llama"),
        good + good,
    ]
    (f.path / "config.json").write_text(f.draw.choice(texts))


def generation_config(f: Folder) -> None:
    names = [
        "eos_token_id",
        "temperature",
        "max_length",
        "validate",
        "__class__",
        "to_dict",
        "stop_strings",
        "num_beams",
    ]
    f.edit("generation_config.json", lambda v: v.update({f.draw.choice(names): f.odd()}))


def cut(f: Folder) -> None:
    path = f.path / f.draw.choice([WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
    os.truncate(path, int(path.stat().st_size * f.draw.random()))


def flip(f: Folder) -> None:
    path = f.path / f.draw.choice([WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
    content = bytearray(path.read_bytes())
    for _ in range(f.draw.choice([1, 20, 500])):
        content[f.draw.randrange(min(len(content), 4000))] = f.draw.randrange(256)
    path.write_bytes(content)


def header_field(f: Folder) -> None:
    field = f.draw.choice(["dtype", "shape", "data_offsets"])
    values = {
        "dtype": ["F64", "I8", "F8_E4M3", "str", 5],
        "shape": [[2**62, 2**62], [-1], [], "x", [10**9], [0]],
        "data_offsets": [[0, 4], [0, 2**63], [-4, 4], [9, 1], []],
    }[field]
    f.header(lambda v: v[f.draw.choice(sorted(v.keys() - {"__metadata__"}))].update({field: f.draw.choice(values)}))


def header_names(f: Folder) -> None:
    def change(v: dict) -> None:
        name = f.draw.choice(sorted(v.keys() - {"__metadata__"}))
        new = f.draw.choice(["\x1b[2J", "model.layers.99.x", "a" * 10**6, "model.layers.0.embed_tokens.weight", ""])
        v[new] = v.pop(name) if f.draw.random() < 0.5 else v[name]

    f.header(change)


def header_length(f: Folder) -> None:
    content = (f.path / WEIGHTS).read_bytes()
    length = f.draw.choice([0, 1, 2**63, 10**8, 10**12, len(content)])
    (f.path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])


def values_of_weights(f: Folder) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(f.path / WEIGHTS)
    name = f.draw.choice(sorted(tensors))
    fill = f.draw.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
    save_file(tensors | {name: tensors[name].fill_(fill)}, f.path / WEIGHTS, {"format": "pt"})


def index(f: Folder) -> None:
    names = [
        "../outside.safetensors",
        "/dev/zero",
        "/dev/stdin",
        "evil.bin",
        "pipe.safetensors",
        "",
        "..",
        "a/b.safetensors",
    ]
    name = f.draw.choice([*names, 5, None, "zero.safetensors", "part.safetensors"])
    shutil.copy(f.path / WEIGHTS, f.path.parent / "outside.safetensors")
    (f.path / WEIGHTS).rename(f.path / "part.safetensors")
    os.mkfifo(f.path / "pipe.safetensors")
    (f.path / "zero.safetensors").symlink_to("/dev/zero")
    whole = f.draw.choice([{"weight_map": {"lm_head.weight": name}}, {"weight_map": name}, {}, {"metadata": name}])
    (f.path / INDEX).write_text(json.dumps(whole))


def pickles(f: Folder) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "evil.bin", "adapter_model.bin"):
        (f.path / name).write_bytes(pickle.dumps(Touch()))
    (f.path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model", "peft_type": "LORA"}')
    code = f"open({str(f.path.parent / CANARY)!r}, 'w')\nclass Evil: pass\n"
    for name in ("modeling_moonwhale.py", "evil.py", "json.py", "sitecustomize.py", "math_verify.py"):
        (f.path / name).write_text(code)
    f.edit("config.json", lambda v: v.update(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}))
    if f.draw.random() < 0.5:
        (f.path / WEIGHTS).unlink()


class Touch:
    def __reduce__(self):
        return open, (CANARY, "w")  # relative: each trial runs in the folder that holds the checkpoint


def not_a_file(f: Folder) -> None:
    names = [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    names.append("additional_chat_templates/a.jinja")
    f.replace(f.draw.choice([*names, "chat_template.jinja", "special_tokens_map.json", INDEX]))


def template(f: Folder) -> None:
    texts = [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ 'a' * 10**10 }}",
        "{{ raise_exception('\x1b[2J\n') }}",
        "{{ messages.x.y }}",
    ]
    texts += [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
    ]
    texts += ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '%9999999999d' % 1 }}", "a" * 10**7, "((" * 10**4]
    texts += [
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        f"{{% include '{f.path}/config.json' %}}",
        "{{ 'a' | center(10**10) }}",
    ]
    texts += ["{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "{{ messages | map('upper') | list }}", ""]
    texts += ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ lipsum(n=100000) }}", "{{ bos_token }}\x1b]0;x\x07"]
    (f.path / "chat_template.jinja").write_text(f.draw.choice(texts))


def tokenizer(f: Folder) -> None:
    shared = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}

    def pattern(v: dict, text: str) -> None:
        v["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split | {"pattern": {"Regex": text}}, v["pre_tokenizer"]],
        }

    def replacement(v: dict) -> None:
        v["normalizer"] = {"type": "Replace", "pattern": {"String": f.draw.choice(["a", ""])}, "content": "a" * 10**6}

    def token(v: dict) -> None:
        v["added_tokens"].append(shared | {"id": f.odd(), "content": f.draw.choice(["<new>", "", "<|eos|>", 5])})

    def long_tokens(v: dict) -> None:
        number, length = f.draw.choice([(19_000, 1000), (10_000, 300), (1, 10**7), (250, 990), (19_000, 6)])
        flags = shared | {"normalized": f.draw.random() < 0.5}
        v["added_tokens"] += [flags | {"id": 9000 + i, "content": f"{i:06}" + "b" * length} for i in range(number)]

    def component(v: dict) -> None:
        """Repeat a part that makes texts longer, or one that the library panics at."""
        replace = {"type": "Replace", "pattern": {"Regex": f.draw.choice(["", "(?=.)", "$", r"\b"])}, "content": "x"}
        prepend = f.draw.choice([{"type": "Prepend", "prepend": "x" * 32}, {"prepend": "x" * 10**6}])
        fixed, text = {"type": "FixedLength", "length": 0}, {"Sequence": {"id": "A", "type_id": 0}}
        kinds = [("normalizer", "normalizers", replace), ("normalizer", "normalizers", prepend)]
        kinds += [("pre_tokenizer", "pretokenizers", part) for part in (fixed, v["decoder"], v["pre_tokenizer"])]
        kinds += [("decoder", "decoders", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9})]
        name, parts, part = f.draw.choice(kinds)
        v[name] = {"type": "Sequence", parts: [part] * f.draw.choice([1, 20, 2000])}
        if f.draw.random() < 0.3:
            v["post_processor"]["single"] = [text] * 10_000
        if f.draw.random() < 0.3:
            v["post_processor"]["special_tokens"]["<|bos|>"]["ids"] = [0] * 10**6

    never = r"(?!\w|\W)(?<=[Qq])"
    patterns = [r"(a+)+$", r"(\w*)*x", "[", r"(a|a)*b", r"\w*\w*\w*x", "(" * 1000, "(?=(a*)+)", r"(?x:#[\n)[\s\S]*b"]
    repeated = [(r"[\s\S]?", 24), (r"[\s\S]{0,32}", 5), (r"(?:[\s\S]|[^\x08])", 24), (r"[\s\S]*", 1), (r"(?>\s*)", 1)]
    patterns += [part * number + never for part, number in repeated]
    changes = [
        lambda v: pattern(v, f.draw.choice(patterns)),
        replacement,
        token,
        long_tokens,
        component,
        component,
        lambda v: v["model"].update(
            {f.draw.choice(["continuing_subword_prefix", "end_of_word_suffix"]): f.draw.choice(["#" * 50, "\u0120"])}
        ),
        lambda v: v.update(x=f.draw.choice([[[]], [{"": {}}], [0]]) * 10**7),
        lambda v: v["model"]["vocab"].update({f.draw.choice(["new", "a", ""]): f.odd()}),
        lambda v: v["model"].update({f.draw.choice(["merges", "vocab", "type", "dropout", "unk_token"]): f.odd()}),
        lambda v: v.update({f.draw.choice(sorted(v)): f.odd()}),
        lambda v: v.update(padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0}),
        lambda v: v.update(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}),
        lambda v: v["model"]["vocab"].pop(f.draw.choice(sorted(v["model"]["vocab"]))),
    ]
    f.edit("tokenizer.json", f.draw.choice(changes))


def tokenizer_config(f: Folder) -> None:
    names = ["eos_token", "bos_token", "model_max_length", "encode", "added_tokens_decoder", "extra_special_tokens"]
    names += [
        "tokenizer_file",
        "vocab_file",
        "tokenizer_class",
        "chat_template",
        "padding_side",
        "__class__",
        "auto_map",
    ]
    value = f.draw.choice([*ODD, "/dev/zero", "evil.Evil", {"5": {"content": "x"}}, "a" * 10**6, ["a" * 10**5] * 9])
    f.edit("tokenizer_config.json", lambda v: v.update({f.draw.choice(names): value}))


FOLDERS = (
    set_config,
    add_config,
    enlarge,
    many_blocks,
    long_lists,
    text_of_config,
    generation_config,
    cut,
    flip,
    header_field,
    header_names,
    header_length,
    values_of_weights,
    index,
    pickles,
    not_a_file,
    template,
    tokenizer,
    tokenizer_config,
)
CHATTING = (template, tokenizer, tokenizer_config)  # seen only by verbs that encode
