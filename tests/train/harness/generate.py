"""Writes `golden/`: a small Llama, tasks for it as local files, and what lm-evaluation-harness's own `HFLM` finds. Needs the extras `oracle`
and `eval`, with `accelerate` and `peft`.

    python tests/train/harness/generate.py

The model is trained for a moment on the tasks' text, so that it writes letters and its guesses differ.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plait.data.tokenizers.tokenizer import ByteTokenizer

GOLDEN = Path(__file__).resolve().parent / "golden"
MODEL, TASKS = GOLDEN / "llama", GOLDEN / "tasks"
END = 256
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|endoftext|>' + message.role + ': ' + message.content | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant: ' }}{% endif %}"
)
LONGEST = 128
FIXED = {"random_seed": 1234, "numpy_random_seed": 1234, "fewshot_random_seed": 1234}
WORDS = [
    "the",
    "law",
    "of",
    "people",
    "and",
    "war",
    "is",
    "a",
    "river",
    "that",
    "runs",
    "between",
    "two",
    "countries",
    "über",
    "naïve",
    "1790",
]


def rows(rng: random.Random) -> dict[str, list[dict]]:
    """The examples of each task; some contexts are empty, end in spaces, or are longer than the model's rows."""
    some = lambda least, most: " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
    choices = [
        {"query": some(2, 30), "choices": [some(1, 1), some(1, 4), some(2, 6)], "gold": rng.randrange(3)} for _ in range(8)
    ]
    letters = [{"query": f"{some(3, 9)}\nAnswer:", "choices": list("ABCD"), "gold": rng.randrange(4)} for _ in range(8)]
    last = [{"context": some(1, 30), "target": " " + some(1, 2)} for _ in range(6)]
    last += [{"context": "", "target": some(2, 2)}, {"context": "the law ", "target": "of"}, {"context": "war\n", "target": "is"}]
    whole = [{"text": some(count, count)} for count in (1, 12, 60, 90)]
    asked = [{"query": some(1, 12), "answer": some(1, 2)} for _ in range(7)] + [{"query": some(60, 60), "answer": "law"}]
    return {"choices": choices, "letters": letters, "last": last, "whole": whole, "written": asked}


def task(name: str, **more: object) -> dict[str, object]:
    """A task file, whose data lies beside the folder in which the harness runs."""
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"tasks/{name}.jsonl"}}, "test_split": "test"}
    metrics = [{"metric": metric} for metric in more.pop("metrics")]  # type: ignore[attr-defined]
    return {"task": f"plait_{name}", **where, **more, "metric_list": metrics}


QUESTION = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "output_type": "multiple_choice"}
FILES = {
    "choices": {**QUESTION, "metrics": ["acc", "acc_norm"], "fewshot_split": "test", "num_fewshot": 1},
    "letters": {**QUESTION, "metrics": ["acc", "acc_norm"]},
    "last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metrics": ["perplexity", "acc"],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", " of", " a"], "max_gen_toks": 40, "do_sample": False},
        "metrics": ["exact_match"],
    },
}


def trained(text: bytes) -> LlamaForCausalLM:
    """Two layers that have read a text for a moment."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(list(text))
    for step in range(150):
        starts = torch.randint(0, len(ids) - 65, (16,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 64] for start in starts])
        batch[:, 0] = END
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def write(found: dict[str, list[dict]]) -> None:
    """The examples as files."""
    for name, examples in found.items():
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in examples)
        (TASKS / f"{name}.jsonl").write_text(lines, "utf-8")


def main() -> None:
    found = rows(random.Random(0))
    TASKS.mkdir(parents=True, exist_ok=True)
    MODEL.mkdir(parents=True, exist_ok=True)
    write(found)
    for name in found:
        (TASKS / f"{name}.yaml").write_text(yaml.safe_dump(task(name, **FILES[name]), sort_keys=False), "utf-8")
    text = "\n".join(" ".join(map(str, one.values())) for every in found.values() for one in every)
    trained(text.encode()).save_pretrained(MODEL)
    (MODEL / "tokenizer.json").write_text(ByteTokenizer().to_json(), "utf-8")
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    own = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), chat_template=TEMPLATE, **ends)
    own.save_pretrained(MODEL)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    os.chdir(GOLDEN)  # where the task files find their data
    lm = HFLM(pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=4)
    names = [f"plait_{name}" for name in FILES]
    said = simple_evaluate(lm, tasks=["plait_written"], task_manager=manager, bootstrap_iters=0, **FIXED)["samples"][
        "plait_written"
    ]
    for one, sample in list(zip(found["written"], said))[:3]:  # some answers are right
        one["answer"] = sample["resps"][0][0]
    write(found)
    golden: dict[str, dict] = {}
    for kind, asked, more in (
        ("plain", names, {}),
        ("chat", ["plait_letters", "plait_written"], {"apply_chat_template": True, "system_instruction": "Say it."}),
    ):
        scored = simple_evaluate(lm, tasks=asked, task_manager=manager, bootstrap_iters=0, **FIXED, **more)
        results = {
            name: {key: value for key, value in one.items() if isinstance(value, float)}
            for name, one in scored["results"].items()
        }
        asked_for = {
            name: [
                {"asked": list(asked), "found": found[0]}
                for one in samples
                for asked, found in zip(one["arguments"], one["resps"], strict=True)
            ]
            for name, samples in scored["samples"].items()
        }
        golden[kind] = {"results": results, "requests": asked_for}
    (GOLDEN / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
