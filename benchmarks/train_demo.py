"""Trains the demo checkpoint, a Phi-3 of 6 million parameters, on Python's standard library.

    python benchmarks/train_demo.py --minutes 60 --output compress/demo/model

Needs torch, transformers, sentencepiece, protobuf and an interpreter with its standard library
sources; no network and no GPU. Takes `--minutes` of training on two CPU cores, plus a minute for
the tokenizer and the measurements. Writes the checkpoint and its card to `--output`, the held-out
text beside that folder, and the figures to `benchmarks/demo_training.json`.

The schedule is driven by the clock (warm-up, constant rate, linear decay), so the run ends in time
whatever share of the machine it gets; two runs give models of like quality, not of equal bytes.
Every `--save-every` minutes a running average of the weights is published in the final layout.
"""

import argparse
import ast
import hashlib
import io
import json
import platform
import random
import sysconfig
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaTokenizerFast,
    Phi3Config,
    Phi3ForCausalLM,
)

HERE = Path(__file__).resolve().parent
CONTEXT = 512
VOCABULARY = 2048  # 2000 pieces, 11 special tokens, the rest padding rows as in Phi-3
PIECES = 2000
HELDOUT_BYTES = 160_000
SUBSET_WINDOWS = 16  # the windows whose perplexity tests/demo/test_demo_model.py recomputes
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written at build time: paths of this machine
CHAT_TOKENS = (  # 2001 to 2010, after <|endoftext|>
    "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


# --------------------------------------------------------------------------------------------- text


def standard_library() -> dict[str, str]:
    """Sources of this interpreter's standard library, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            sources["/".join(parts)] = text
    return sources


def split_heldout(sources: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Take files in the order of their path's hash until the held-out text is large enough."""
    heldout: dict[str, str] = {}
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if 2_000 <= len(sources[name]) <= 40_000:
            heldout[name] = sources[name]
        if sum(map(len, heldout.values())) >= HELDOUT_BYTES:
            break
    return {name: text for name, text in sources.items() if name not in heldout}, heldout


def conversations(sources: dict[str, str]) -> list[list[dict[str, str]]]:
    """Short chats about the library's own functions, so that the chat tokens' rows are trained."""
    chats = []
    for name, source in sources.items():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            doc, code = ast.get_docstring(node) or "", ast.unparse(node)
            if not 0 < len(doc) <= 400 or len(code) > 800:
                continue
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if len(chats) % 2:
                question, answer = f"Write the docstring of {module}.{node.name}.", doc
            else:
                question, answer = f"Write the function {node.name} of the module {module}.", code
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if len(chats) % 3 == 0:
                chat.insert(0, {"role": "system", "content": "You know Python's standard library."})
            chats.append(chat)
    return chats


# ---------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(sources: dict[str, str], output: Path) -> LlamaTokenizerFast:
    """A Llama-style SentencePiece model with Phi-3's special tokens, saved slow and fast."""
    lines = (line for source in sources.values() for line in source.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        add_dummy_prefix=False,  # learn indentation as inside a file; enabled below
        max_sentence_length=10_000,
        input_sentence_size=400_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.add_dummy_prefix = True
    (output / "tokenizer.model").write_bytes(proto.SerializeToString())

    # legacy=True makes the converter prepend "▁" to the text after every special token, as Phi-3's
    # own tokenizer.json and llama.cpp do.
    files = {"vocab_file": str(output / "tokenizer.model")}
    converted = LlamaTokenizerFast(**files, legacy=True, add_prefix_space=True)
    converted.backend_tokenizer.save(str(output / "tokenizer.json"))
    tokenizer = LlamaTokenizerFast(
        **files,
        tokenizer_file=str(output / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        legacy=False,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    chat_tokens = [AddedToken(token, rstrip=True, normalized=False) for token in CHAT_TOKENS]
    tokenizer.add_tokens(chat_tokens, special_tokens=True)
    tokenizer.save_pretrained(output, save_jinja_files=False)  # template in tokenizer_config.json
    return LlamaTokenizerFast.from_pretrained(output)


def token_stream(sources: dict[str, str], tokenizer: LlamaTokenizerFast, seed: int) -> torch.Tensor:
    """All documents and chats in random order, each closed by <|endoftext|>."""
    texts = [text + tokenizer.eos_token for text in sources.values()]
    texts += tokenizer.apply_chat_template(conversations(sources), tokenize=False)
    random.Random(seed).shuffle(texts)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor(document) for document in ids])


# -------------------------------------------------------------------------------------- measurement


def heldout_windows(text: str, tokenizer: LlamaTokenizerFast) -> torch.Tensor:
    """[windows, 512]: consecutive pieces of 511 tokens, each after <s>; the rest is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return F.pad(ids, (1, 0), value=tokenizer.bos_token_id)


@torch.inference_mode()
def window_losses(model: Phi3ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of each window, <s> not scored."""
    losses = []
    for batch in windows.split(8):
        logits = model(batch).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(nll.view(len(batch), -1).mean(1))
    return torch.cat(losses)


def unigram_perplexity(stream: torch.Tensor, windows: torch.Tensor) -> float:
    """Perplexity of the training set's token frequencies (add-one smoothing), same tokens."""
    counts = torch.bincount(stream, minlength=VOCABULARY).double() + 1
    return (-(counts / counts.sum()).log()[windows[:, 1:]].mean()).exp().item()


# ----------------------------------------------------------------------------------------- training


def new_model(tokenizer: LlamaTokenizerFast) -> Phi3ForCausalLM:
    ids = tokenizer.convert_tokens_to_ids
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=ids("<s>"),
        eos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        attn_implementation="sdpa",
    )
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"),
        eos_token_id=[ids("<|endoftext|>"), ids("<|assistant|>"), ids("<|end|>")],
        pad_token_id=ids("<|endoftext|>"),
    )
    return model


def new_optimizers(model: Phi3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up over 30 steps, constant, then linear decay over the last 45 % of the time."""
    return min((step + 1) / 30, 1.0, max(1.0 - progress, 0.0) / 0.45)


def sample_batch(stream, rows: int, generator: torch.Generator, bos: int) -> torch.Tensor:
    """[rows, 513] from random places; seven rows of eight begin with <s>, as when measured."""
    starts = torch.randint(0, len(stream) - CONTEXT - 1, (rows,), generator=generator)
    batch = stream[starts[:, None] + torch.arange(CONTEXT + 1)]
    batch[torch.rand(rows, generator=generator) < 7 / 8, 0] = bos
    return batch


def train(model: Phi3ForCausalLM, stream: torch.Tensor, args, publish) -> None:
    """Train until the time is up; `publish(weights, figures)` is called on the way and at the end.

    On the way it gets the average of the last weights: at a full learning rate they are noisy.
    """
    generator = torch.Generator().manual_seed(args.seed)
    optimizers = new_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]

    @torch.compile(disable=not args.compile)
    def batch_loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def figures() -> dict[str, int]:
        return {
            "steps": step,
            "training_tokens": step * args.batch * CONTEXT,
            "wall_seconds": round(time.monotonic() - start),
            "cpu_seconds": round(time.process_time() - cpu_start),
        }

    start, cpu_start, saved, step = time.monotonic(), time.process_time(), time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        factor = learning_rate_factor(step, progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss = batch_loss(sample_batch(stream, args.batch, generator, model.config.bos_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(0.02, 1 / step))
        if step % 10 == 0:
            print(
                f"step {step}  loss {loss.item():.3f}  rate {factor:.3f}  {figures()}", flush=True
            )
        if time.monotonic() - saved > 60 * args.save_every:
            publish(average, figures())
            saved = time.monotonic()
    publish([parameter.detach() for parameter in parameters], figures())


# ------------------------------------------------------------------------------------------ writing


def publish_checkpoint(model, weights, training, stream, heldout_text, tokenizer, args) -> None:
    """Save `weights` in bfloat16, measure in float32 what was saved, write card and figures."""
    copy = Phi3ForCausalLM(model.config).to(torch.bfloat16)
    copy.generation_config = model.generation_config
    with torch.no_grad():
        for parameter, weight in zip(copy.parameters(), weights, strict=True):
            parameter.copy_(weight)
    copy.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only

    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    windows = heldout_windows(heldout_text, tokenizer)
    losses = window_losses(saved, windows)
    perplexity, unigram = losses.mean().exp().item(), unigram_perplexity(stream, windows)
    command = f"python benchmarks/train_demo.py --minutes {args.minutes:g}"
    figures = {
        "command": f"{command} --output compress/demo/model",
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "weights_bytes": (args.output / "model.safetensors").stat().st_size,
        "training_set_tokens": len(stream),
        **training,
        "heldout_bytes": len(heldout_text.encode()),
        "heldout_windows": len(windows),
        "heldout_scored_tokens": windows[:, 1:].numel(),
        "perplexity": round(perplexity, 4),
        "unigram_perplexity": round(unigram, 2),
        "unigram_ratio": round(unigram / perplexity, 2),
        "subset_windows": SUBSET_WINDOWS,
        "subset_perplexity": round(losses[:SUBSET_WINDOWS].mean().exp().item(), 4),
        "unigram_counts": torch.bincount(stream, minlength=VOCABULARY).tolist(),
    }
    text = json.dumps(figures, indent=1).replace(",\n  ", ", ")  # the counts on one line
    args.figures.write_text(text + "\n", encoding="utf-8")
    card = (HERE / "demo_card.md").read_text(encoding="utf-8")
    (args.output / "README.md").write_text(card.format(**figures), encoding="utf-8")
    print(f"published: perplexity {perplexity:.3f}, unigram {unigram:.1f}, {training}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="wall-clock limit of the training loop")
    add("--output", type=Path, default=HERE.parent / "compress" / "demo" / "model")
    add("--figures", type=Path, default=HERE / "demo_training.json")
    add("--save-every", type=float, default=8, metavar="MINUTES")
    add("--batch", type=int, default=16, help="rows of 512 tokens per step")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--no-compile", dest="compile", action="store_false", help="without a C++ compiler; slower")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    sources, heldout = split_heldout(standard_library())
    heldout_text = "\n".join(heldout.values())
    (args.output.parent / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    licence = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    (args.output / "LICENSE-PYTHON.txt").write_text(licence, encoding="utf-8")

    tokenizer = train_tokenizer(sources, args.output)
    stream = token_stream(sources, tokenizer, args.seed)
    print(
        f"{len(sources)} files, {len(stream):,} tokens; held out: {', '.join(heldout)}", flush=True
    )

    model = new_model(tokenizer)

    def publish(weights, training) -> None:
        publish_checkpoint(model, weights, training, stream, heldout_text, tokenizer, args)

    train(model, stream, args, publish)


if __name__ == "__main__":
    main()
