"""Causal language models as routers: loading them, what they read, and the logits of the few tokens they answer with.

A router made of a language model answers with one token out of a short list (see `templates`). So nothing is sampled
and nothing is parsed: `encode_instructions` makes the same token ids in training and in serving, `label_logits` reads
the logits of the allowed tokens at the last position in one batched forward pass, and `features` turns them into
what `calibration` takes.

Weights come from a folder or the local Hugging Face cache, as everywhere in this package. Four-bit loading (NF4) works
on a GPU and, slowly, on a CPU.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routewright.base_models import Base, fetch_weights
from routewright.errors import MissingSetup, UserError
from routewright.templates import WRAPS, Template, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 7_000_000_000  # parameters of a base model; beyond, LoRA on one laptop GPU is out of reach
ADAPTER_CARD = "adapter_config.json"
DTYPES = ("fp32", "bf16")
LEAST_SPARED = 0.2  # share of all tokens that must be the same start of every row before it is computed apart
MOST_TOKENS = 16_384  # of a batch with its padding: long prompts travel in smaller batches
_REPOSITORY = Path(__file__).resolve().parents[2]
MOST_CHARACTERS = 256  # of a prompt, per token of room; no vocabulary's tokens are as long on average
SAMPLE_MODEL = _REPOSITORY / "data" / "sample" / "models" / "strong"
_SENTINEL = "\u2402prompt\u2403"  # stands for the instruction while a chat template is taken apart
# Some templates write today's date, or leave room to think first; training and serving must read the same.
_CHAT_SETTINGS = {"date_string": "01 Jan 2025", "enable_thinking": False}
_PROBES = ("Why?", "What is it.\n")  # after which a label must be one token; "" too where the wrap has an end

Say = Callable[[str], None]
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- finding and sizing

def find_causal(name: str, say: Say, default: str) -> Base:
    """The base model: a folder, a hub id, or `auto` for `default`, which falls back to a sample model with a warning.

    Raises MissingSetup within seconds, naming the download command, for a model asked for by name.
    """
    try:
        return Base(default if name == "auto" else name, fetch_weights(default if name == "auto" else name))
    except MissingSetup as error:
        if name != "auto" or not SAMPLE_MODEL.is_dir():
            raise
        say(f"WARNING: {error}.\nWARNING: going on with {SAMPLE_MODEL.name!r} of the sample pool, a model of half a "
            f"million parameters that knows sums and little else; it is no match for {default}")
        return Base(str(SAMPLE_MODEL), SAMPLE_MODEL)


def find_folder(name: str | Path) -> Path:
    """The weights folder of a name in router.json: as written, from the repository's root, or in the hub's cache.

    Raises MissingSetup with the download command when it is none of these.
    """
    from routewright.encoders import find_weights

    here = _REPOSITORY / name
    return here if not Path(name).is_dir() and not Path(name).is_absolute() and here.is_dir() else find_weights(name)


def count_parameters(folder: str | Path) -> int:
    """Parameters of a model folder, from the headers of its weight files (nothing is loaded), else from its config.

    Of an adapter folder, those of its base. Raises UserError or MissingSetup when the folder says neither.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CARD).is_file():
        return count_parameters(adapter_base(folder))
    config = _read_json(folder / "config.json")
    files = sorted(folder.glob("model*.safetensors"))
    if files and "quantization_config" not in config:  # packed weights have other shapes than the parameters
        return sum(_header_parameters(file) for file in files)
    return _meta_parameters(folder)


def check_size(folder: str | Path, name: str, largest: int = LARGEST) -> int:
    """The parameter count of a base model. Raises UserError when it has more than `largest`."""
    count = count_parameters(folder)
    if count > largest:
        raise UserError(f"{name}: the base model has {count / 1e9:.2f} billion parameters and this profile takes up to "
                        f"{largest / 1e9:.2f} billion; take a smaller one, such as Qwen/Qwen2.5-1.5B-Instruct")
    return count


def _header_parameters(file: Path) -> int:
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < 1 << 28:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as safetensors ({error}); fetch the file again") from None
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _meta_parameters(folder: Path) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except (OSError, ValueError, KeyError) as error:
        raise _not_loading(folder, error) from None


# ---------------------------------------------------------------- loading

def load_causal(folder: str | Path, *, four_bit: bool = False, dtype: str = "fp32",
                trainable_adapter: bool = False) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a causal language model, in eval mode, on the GPU where there is one.

    folder: weights, a hub id in the local cache, or an adapter folder (`adapter_config.json`), whose base is found and
    loaded the same way. four_bit: NF4 with double quantisation and bf16 compute; `dtype` is then that of everything
    which is not quantised. The tokenizer has a pad token.

    Raises MissingSetup (no weights, no bitsandbytes) or UserError (weights missing from the files).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be {' or '.join(DTYPES)}; got {dtype!r}")
    from routewright.encoders import load_tokenizer

    folder = find_folder(folder)
    if (folder / ADAPTER_CARD).is_file():
        return _load_adapter(folder, four_bit, dtype, trainable_adapter)
    _check_has_weights(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model = _from_pretrained(folder, four_bit, dtype)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"{folder}: the tokenizer knows {len(tokenizer)} tokens and the model {rows}; they do not "
                        "belong together, so fetch the whole folder again")
    return model, tokenizer


def adapter_base(folder: str | Path) -> Path:
    """The folder of the base model that an adapter belongs to: found on this machine, never downloaded."""
    folder = Path(folder)
    name = _read_json(folder / ADAPTER_CARD).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / ADAPTER_CARD}: base_model_name_or_path is missing; train the adapter again")
    card = folder / "router.json"
    other = _read_json(card).get("base_model") if card.is_file() else None
    for candidate in (name, other):
        if candidate and candidate != str(folder):
            try:
                return find_folder(candidate)
            except MissingSetup:
                continue
    hub = other if isinstance(other, str) and other.count("/") == 1 else name
    raise MissingSetup(f"{folder}: the adapter's base model {name!r} is not on this machine; fetch it with `hf "
                       f"download {hub}`, or put its folder where {ADAPTER_CARD} says")


def weights_hash(folder: str | Path) -> str:
    """A name for the weights of a model folder that changes with them: its weight files' sizes, heads and tails."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("model*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}\x1f{size}\x1f".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def _from_pretrained(folder: Path, four_bit: bool, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from routewright.encoders import quiet_loading

    device = _device()
    low = four_bit or dtype == "bf16"
    more = {"quantization_config": _four_bit_config(), "device_map": {"": device}} if four_bit else {}
    try:
        with quiet_loading(), _quiet_packages():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if low else torch.float32, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, **more)
    except Exception as error:  # noqa: BLE001 - the loader raises a dozen kinds, all mean the same to the user
        raise _not_loading(folder, error) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} weights are not in the file (first: {missing[0]}), so parts of the "
                        "model would be random; this is no causal language model, or its file is damaged: fetch the "
                        "whole folder again")
    if four_bit:
        keep_unpacked(model)
        if dtype == "fp32":
            _widen(model)
        return model.eval()
    return model.to(device).eval()


def _device() -> str:
    """The GPU of this process where there is one, else `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _four_bit_config() -> Any:
    import importlib.util

    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingSetup("four-bit loading needs the package bitsandbytes, which is not installed; run "
                           "`pip install bitsandbytes`, or go without --four_bit")
    if not torch.cuda.is_available():
        _say_slow()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


@lru_cache(maxsize=1)
def _say_slow() -> None:
    log.warning("4-bit on the CPU: slow")


def keep_unpacked(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first forward pass in eval mode.

    On CPUs with AVX512_BF16 it does so for good, and training then raises or silently loses gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _widen(model: Any) -> None:
    """Everything that is not quantised in float32, as peft's preparation for training leaves it."""
    import torch

    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()


def _load_adapter(folder: Path, four_bit: bool, dtype: str, trainable: bool) -> tuple[Any, Any]:
    weights, card = folder / "adapter_model.safetensors", folder / "router.json"
    if not weights.is_file():
        raise MissingSetup(f"{folder}: {ADAPTER_CARD} is there and {weights.name} is not; fetch the whole folder "
                           "again, or train the adapter again")
    settings = _read_json(folder / ADAPTER_CARD)
    if settings.get("peft_type") != "LORA" or settings.get("megatron_config"):
        raise UserError(f"{folder / ADAPTER_CARD}: peft_type {settings.get('peft_type')!r} is not a plain LORA "
                        "adapter; only those of train_llm.py and train_dpo.py load here")
    base = adapter_base(folder)
    known = _read_json(card).get("base_weights") if card.is_file() else None
    if known:
        check_weights(base, known, str(folder))
    model, tokenizer = load_causal(base, four_bit=four_bit, dtype=dtype)
    try:
        with _quiet_packages():
            from peft import PeftModel, get_peft_model_state_dict
            from safetensors import safe_open

            with safe_open(weights, framework="np") as file:
                held = set(file.keys())
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, local_files_only=True)
            wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))  # else it asks the hub
    except Exception as error:  # noqa: BLE001 - two libraries raise a dozen kinds
        raise _misfit(folder, base, _first_line(error)) from None
    if held != wanted:
        few, some = ("lacks", wanted - held) if wanted - held else ("has no place for", held - wanted)
        raise _misfit(folder, base, f"it {few} {len(some)} weights, first: {min(some)}")
    return model.eval(), tokenizer


def _misfit(folder: Path, base: Path, what: str) -> UserError:
    return UserError(f"{folder}: the adapter does not fit its base model {base} ({what}); it was trained over another "
                     "one, so put that there or train it again")


def check_weights(base: Path, known: str, who: str) -> None:
    """Raise UserError when a base model's weights are not those that `who` was trained and calibrated over."""
    if known != weights_hash(base):
        raise UserError(f"{who}: trained or calibrated over other weights than those in {base}; put its own base model "
                        "there, or make the router again")


def add_lora(model: Any, *, r: int = 16, alpha: int = 32, dropout: float = 0.05, seed: int = 0) -> Any:
    """The model with fresh LoRA adapters on all its linear layers; only they train. Equal seeds, equal start."""
    import torch

    with _quiet_packages(), torch.random.fork_rng():
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none",
                                                target_modules="all-linear", task_type="CAUSAL_LM"))


@contextmanager
def _quiet_packages() -> Iterator[None]:
    """Leave away what peft and bitsandbytes say on import of packages that play no part here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line about an optional package at every import
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, imported by accelerate, warns of a missing GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _check_has_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise MissingSetup(f"{folder}: no config.json, so this is no model folder; fetch one with `hf download <name>`")
    if not any(folder.glob("model*.safetensors")):
        raise MissingSetup(f"{folder}: the folder holds no weights (model.safetensors); fetch it whole with "
                           "`hf download <name>`")


def _not_loading(folder: str | Path, error: Exception) -> MissingSetup:
    return MissingSetup(f"{folder}: the weights do not load as a causal language model ({_first_line(error)}); fetch "
                        "the whole folder again with `hf download`")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingSetup(f"{path.parent}: no {path.name}, so this is no model folder; fetch it whole with "
                           "`hf download <name>`")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the folder again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; fetch the folder again")
    return found


# ---------------------------------------------------------------- what the network reads

def choose_wrap(asked: str, tokenizer: Any) -> str:
    """`asked`, or for `auto` the tokenizer's chat template where it has one, else the Alpaca form. Raises UserError."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "auto":
        return "chat" if has_chat else "alpaca"
    if asked not in WRAPS:
        raise UserError(f"wrap {asked!r} is not one of auto, {', '.join(WRAPS)}")
    if asked == "chat" and not has_chat:
        raise UserError(f"{tokenizer.name_or_path}: wrap chat needs a chat template and this tokenizer has none; use "
                        "wrap alpaca, or an instruction-tuned base model")
    return asked


def encode_instructions(tokenizer: Any, template: Template, wrap: str, instructions: Sequence[str],
                        max_length: int) -> list[list[int]]:
    """Token ids of each wrapped instruction, up to where the answer begins; one place is kept for the answer.

    A text that is too long loses the end of its prompt, never the question or the wrap, so that a row with its answer
    always fits `max_length`. Raises UserError where not even an empty prompt would fit, and for an instruction that
    this template did not make.
    """
    head, tail = _affixes(wrap, tokenizer)
    start = _start_ids(wrap, tokenizer)
    head, room = head + template.question, max_length - 1 - len(start)
    least = max(len(_ids(tokenizer, [head + tail])[0]), sum(map(len, _ids(tokenizer, [head, tail]))))
    if least > room:
        raise UserError(f"max_length {max_length} holds no prompt: the question, its {wrap} form and the answer alone "
                        f"take {least + len(start) + 1} tokens; raise --max_length, or use the bare style")
    most = max_length * MOST_CHARACTERS  # a prompt of megabytes would take minutes and gigabytes, for its first words
    bodies = [template.prompt_of(text)[:most].encode("utf-8", "replace").decode() for text in instructions]
    rows = _ids(tokenizer, [head + body + tail for body in bodies])
    reserved = [token for token in tokenizer.all_special_tokens if token]
    for i, body in enumerate(bodies):
        if any(token in body for token in reserved):
            rows[i] = _defused(tokenizer, head, body, tail, room)
        elif len(rows[i]) > room:
            rows[i] = _cut(tokenizer, head, body, tail, room)
    return [start + ids or [_filler(tokenizer)] for ids in rows]


def label_ids(tokenizer: Any, template: Template, wrap: str) -> list[int]:
    """The token of each label, where it stands after a wrapped instruction. Raises UserError naming the tokenizer.

    Where the wrap does not end in white space, a label with a space before it is what text would hold, and its token
    is one that the model has seen: it is taken where all labels have one.
    """
    head, tail = _affixes(wrap, tokenizer)
    texts = [head + template.render(probe) + tail for probe in (*_PROBES, *([""] if tail else []))]
    for lead in ("", " ") if tail[-1:].isspace() else (" ", ""):
        found = [_one_token(tokenizer, texts, lead + label) for label in template.labels]
        if None not in found and len(set(found)) == len(found):
            return found
    for label in template.labels:
        if _one_token(tokenizer, texts, label) is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer does not write the answer {label!r} as one token "
                            f"of its own after the {wrap} form, so its logits cannot be read; take another base model"
                            + (", or fewer models" if template.mode == "decision" else ""))
    raise UserError(f"{tokenizer.name_or_path}: the tokenizer writes two of the answers "
                    f"{', '.join(template.labels)} as the same token; take another base model")


def _one_token(tokenizer: Any, texts: list[str], answer: str) -> int | None:
    """The token that `answer` adds to each of the texts, if it is one and the same, and known."""
    added = {_added(*_ids(tokenizer, [text, text + answer])) for text in texts}
    return added.pop() if len(added) == 1 and not added & {None, tokenizer.unk_token_id} else None


def _added(before: list[int], after: list[int]) -> int | None:
    return after[-1] if len(after) == len(before) + 1 and after[:-1] == before else None


def _affixes(wrap_name: str, tokenizer: Any) -> tuple[str, str]:
    """What stands before and after an instruction."""
    wrap_name = choose_wrap(wrap_name, tokenizer)
    if wrap_name != "chat":
        text = wrap(wrap_name, _SENTINEL)
    else:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _SENTINEL}], tokenize=False,
                                             add_generation_prompt=True, **_CHAT_SETTINGS)
    if text.count(_SENTINEL) != 1:
        raise UserError(f"{tokenizer.name_or_path}: its chat template does not repeat the user's words once as they "
                        "are; use wrap alpaca")
    head, tail = text.split(_SENTINEL)
    return head, tail


def _start_ids(wrap_name: str, tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before a text; none for a chat, whose template writes its own. Never an end."""
    if choose_wrap(wrap_name, tokenizer) == "chat":
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start:start + len(plain)] == plain:
            return list(full[:start])
    return []


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _cut(tokenizer: Any, head: str, body: str, tail: str, room: int) -> list[int]:
    """The ids with about the longest start of `body` that fits. Text is cut, not ids, so they are those of a text."""
    stops = range(len(body), -1, -1)
    if tokenizer.is_fast:
        spans = tokenizer(head + body + tail, add_special_tokens=False, return_offsets_mapping=True,
                          verbose=False)["offset_mapping"]
        behind = sum(begin >= len(head) + len(body) for begin, _ in spans)
        begins = [max(0, begin - len(head)) for begin, _ in spans[:max(0, room - behind) + 1]]
        stops = sorted({0, *begins}, reverse=True)
    fitting = (ids for stop in stops if len(ids := _ids(tokenizer, [head + body[:stop] + tail])[0]) <= room)
    return next(fitting)


def _defused(tokenizer: Any, head: str, body: str, tail: str, room: int) -> list[int]:
    """The ids of a prompt that spells out control tokens, such as the end of a turn: there they are words like others.

    Else a prompt could close the question and give the answer itself.
    """
    before, after = _ids(tokenizer, [head, tail])
    words = tokenizer(body, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return before + words[:max(0, room - len(before) - len(after))] + after


def _filler(tokenizer: Any) -> int:
    """What stands for a text without any token."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(token for token in known if token is not None)


# ---------------------------------------------------------------- what the network answers

def label_logits(model: Any, rows: Sequence[Sequence[int]], ids: Sequence[int], batch_size: int = 32,
                 pad_id: int = 0) -> np.ndarray:
    """The logits (N, K) float64 of the K tokens `ids` after each of the N rows of token ids, in one forward pass each.

    Rows of like length share a batch, padded on the left; a start that all rows share is computed once, and the
    language-model head for the last position only. Takes plain, peft, 4-bit and DDP-wrapped models, in training mode
    too, and leaves them as they were. Every rank of a sharded model has to call it with the same rows.
    """
    import torch

    network = model.module if hasattr(model, "module") and not _is_fsdp(model) else model
    logits = np.empty((len(rows), len(ids)))
    with _evaluating(network), torch.no_grad():
        device = next(network.parameters()).device
        columns = torch.tensor(list(ids), device=device)
        start = _SharedStart(network, rows, device)
        for index in batches([len(row) for row in rows], batch_size):
            batch = _pad_left([rows[i][start.length:] for i in index], pad_id, start.length)
            out = start.forward({name: tensor.to(device) for name, tensor in batch.items()})
            logits[index] = out.index_select(1, columns).float().cpu().numpy()
    return logits


def features(template: Template, logits: np.ndarray) -> np.ndarray:
    """What calibration reads (N, F): centred log-probabilities among the labels, or the expected level / 9."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    if template.mode == "difficulty":
        return np.exp(logs) @ np.linspace(0.0, 1.0, logits.shape[1])[:, None]
    return logs - logs.mean(axis=1, keepdims=True)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of batches of like length, the longest first; long rows travel in smaller batches."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, min(batch_size, MOST_TOKENS // max(1, lengths[order[start]])))
        yield order[start:start + count]
        start += count


class _SharedStart:
    """The tokens with which all rows begin (the question of a template), computed once and kept for every batch.

    `length` is 0 where there is little to spare, or where the network keeps something else than the keys and values of
    all positions. Zeros may then stand between the start and a padded row, which only full attention sees past.
    """

    def __init__(self, network: Any, rows: Sequence[Sequence[int]], device: Any) -> None:
        import torch

        self.network = network
        self.keep = {"logits_to_keep": 1} if _takes(network, "logits_to_keep") else {}
        self.length, self.cache = 0, None
        length = _shared_tokens(rows)
        spared = length * (len(rows) - 1)
        if not length or spared < LEAST_SPARED * sum(map(len, rows)) or not _attends_to_all(network):
            return
        ids = torch.tensor([list(rows[0][:length])], device=device)
        cache = network(input_ids=ids, use_cache=True, **self.keep).past_key_values
        if {type(layer).__name__ for layer in getattr(cache, "layers", ())} == {"DynamicLayer"}:
            self.length, self.cache = length, cache

    def forward(self, batch: dict[str, Any]) -> Any:
        """(B, V) logits at the last position of a batch of what follows the start."""
        if self.cache is None:
            return self.network(**batch, use_cache=False, **self.keep).logits[:, -1]
        from transformers import DynamicCache

        count, cache = len(batch["input_ids"]), DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), i)
        return self.network(**batch, past_key_values=cache, use_cache=True, **self.keep).logits[:, -1]


def _shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """With how many equal tokens all rows begin; of every row at least one is left over."""
    if len(rows) < 2:
        return 0
    ends = min(rows), max(rows)
    shared = next((i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), min(map(len, ends)))
    return min(shared, min(map(len, rows)) - 1)


def _attends_to_all(network: Any) -> bool:
    config = network.config.get_text_config()
    return set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"} \
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def _pad_left(rows: Sequence[Sequence[int]], pad_id: int, before: int = 0) -> dict[str, Any]:
    """Rows of like width, with what is to be seen and the positions; `before` tokens stand ahead of each, unpadded."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.ones((len(rows), before + width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row):] = torch.tensor(row)
        mask[i, before:before + width - len(row)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@contextmanager
def _evaluating(network: Any) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    keep_unpacked(network)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _takes(network: Any, argument: str) -> bool:
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    return argument in inspect.signature(type(base).forward).parameters


def _is_fsdp(model: Any) -> bool:
    return "FullyShardedDataParallel" in type(model).__name__ or type(model).__name__.startswith("FSDP")
