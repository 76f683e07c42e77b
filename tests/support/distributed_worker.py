"""What each process of a distributed check does: `torchrun -m tests.support.distributed_worker FOLDER`.

FOLDER/cases.json holds the cases by name. Every case runs on all processes, each beside a copy of the model in one
piece, and FOLDER/results.jsonl gets one line: the case's name, and what each rank measured. Nothing is judged here.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from btx_merge.modeling import BTXForCausalLM
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

PAD, VOCAB = 0, 61
LENGTHS = [12, 9, 4, 11]  # of the sequences in the batch: each process has another number of tokens
LEARNING_RATE = 0.1

Batch = dict[str, torch.Tensor]


def padded_batch() -> Batch:
    """Four sequences of different lengths, padded on the right, all of whose tokens are labels."""
    ids = torch.randint(3, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def split(batch: Batch, parts: int) -> list[Batch]:
    return [
        dict(zip(batch, rows, strict=True)) for rows in zip(*(x.chunk(parts) for x in batch.values()), strict=True)
    ]


def items_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float()


def difference(ours: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest difference, relative to the largest expected value."""
    if ours is None or expected is None:
        return float("inf")
    expected = expected.detach().float()
    return float((whole(ours) - expected).abs().max() / expected.abs().max())


def gradients_on_one_process(model: BTXForCausalLM, parts: list[Batch]) -> tuple[float, dict[str, Any]]:
    """The mean of the parts' own losses, weighted with their labels, and its gradients, summed in float32."""
    total, gradients = 0.0, {}
    for part in parts:
        model.zero_grad()
        loss = model(**part).loss * items_of(part) / sum(map(items_of, parts))
        loss.backward()
        total += loss.item()
        for name, parameter in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad.float()
    return total, gradients


def load(folder: Path, case: dict[str, Any]) -> tuple[BTXForCausalLM, BTXForCausalLM]:
    """The distributed model, and the same in one piece, with the plain loop over its experts and in float32."""
    path = folder / case["model"]
    config = {"distributed_config": DistributedConfig(**case["distributed"])} if case.get("distributed") else {}
    model = BTXForCausalLM.from_pretrained(path, experts_implementation=case.get("experts", "grouped_mm"), **config)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options = {"experts_implementation": "eager", "dtype": "float32", **case.get("reference", {})}
    return model, BTXForCausalLM.from_pretrained(path, **options)


def pieces(model: BTXForCausalLM) -> dict[str, Any]:
    """Per parameter the shape of the whole; for a DTensor what this process holds, and the axes that it lies on."""
    return {
        name: [list(x.shape), list(x.to_local().shape), list(x.device_mesh.mesh_dim_names)]
        if isinstance(x, DTensor)
        else [list(x.shape), None, None]
        for name, x in model.named_parameters()
    }


def check_step(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward, in evaluation against the whole batch and in training against its parts in turn.

    Without data parallelism every process has the whole batch. With it each has a part, and the loss is scaled as
    Trainer scales it: by the number of parts, since the gradients are averaged.
    """
    model, reference = load(folder, case)
    count = case["distributed"].get("fsdp_size", 1)
    batch = padded_batch()
    parts, items = split(batch, count), items_of(batch)
    mine = parts[dist.get_rank() if count > 1 else 0]
    out: dict[str, Any] = {"pieces": pieces(model)}
    for mode, reference_parts in (("eval", [batch]), ("train", parts)):
        model.train(mode == "train").zero_grad()
        reference.train(mode == "train")
        expected, gradients = gradients_on_one_process(reference, reference_parts)
        with torch.no_grad():
            logits = model(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
            exact = reference(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
        result = model(**mine, num_items_in_batch=items)
        (count * result.loss).backward()
        loss = whole(result.loss).clone()
        if count > 1:
            dist.all_reduce(loss)
        out[mode] = {
            "loss value": loss.item(),
            "logits": difference(logits, exact),
            "logits with gradients": difference(result.logits, exact),
            "loss": abs(loss.item() / expected - 1),
            "gradients": {name: difference(p.grad, gradients[name]) for name, p in model.named_parameters()},
            "gradient dtypes": sorted({str(p.grad.dtype) for p in model.parameters()}),
        }
    return out


def check_generate(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Greedy, with a cache, for two prompts of which one is padded on the left."""
    model, reference = load(folder, case)
    held = pieces(model)  # afterwards FSDP still holds the whole head
    ids = padded_batch()["input_ids"][:2, :8].clone()
    ids[1, :3] = PAD
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ours, expected = (
        m.generate(
            ids, attention_mask=(ids != PAD).long(), output_scores=True, return_dict_in_generate=True, **options
        )
        for m in (model, reference)
    )
    return {
        "pieces": held,
        "scores": difference(torch.stack(ours.scores), torch.stack(expected.scores)),
        "same tokens": ours.sequences.tolist() == expected.sequences.tolist(),
    }


def check_save(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """On every process, as transformers wants it. The folder is looked at afterwards, by the one process of pytest."""
    model, _ = load(folder, case)
    held = pieces(model)
    model.save_pretrained(folder / "saved" / case["name"], is_main_process=dist.get_rank() == 0)
    dist.barrier()
    return {"pieces": held}


def check_trainer(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Two optimiser steps of `Trainer`, each over the batch, one sequence per process and micro-batch."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, reference = load(folder, case)
    batch = padded_batch()
    sequences = split(batch, len(LENGTHS))
    parts = sequences if reference.config.router_aux_loss_coef else [batch]
    out: dict[str, Any] = {"loss": [], "gradients": []}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            trained = model.module if hasattr(model, "module") else model
            self.gradients = {name: whole(parameter.grad).clone() for name, parameter in trained.named_parameters()}
            out["pieces"] = pieces(trained)

        def on_log(self, arguments, state, control, logs, **kwargs):
            if "loss" not in logs:
                return
            expected, gradients = gradients_on_one_process(reference.train(), parts)
            out["loss"].append(abs(logs["loss"] / expected - 1))
            out["gradients"].append({name: difference(self.gradients[name], gradients[name]) for name in gradients})
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    parameter.sub_(LEARNING_RATE * gradients[name])

    arguments = TrainingArguments(
        output_dir=str(folder / "saved" / case["name"]),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(LENGTHS) // dist.get_world_size(),
        max_steps=2,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **case.get("arguments", {}),
    )
    dataset = [{name: value[0] for name, value in sequence.items()} for sequence in sequences]
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[Watch()])
    trainer.train()
    trainer.save_model()
    dist.barrier()
    out["wrapper"] = type(trainer.model_wrapped).__name__
    out["counts shifted labels"] = getattr(trainer, "_loss_shifts_labels", False)
    saved = BTXForCausalLM.from_pretrained(folder / "saved" / case["name"]).state_dict()
    out["saved"] = {name: difference(saved[name], value) for name, value in reference.state_dict().items()}
    return out


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        start = time.monotonic()
        check = globals()[f"check_{case['kind']}"]
        try:
            result = check(folder, {"name": name, **case})
        except Exception:
            result = {"error": traceback.format_exc()}
        result["seconds"] = round(time.monotonic() - start, 2)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, result)
        if dist.get_rank() == 0:
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps({"name": name, "ranks": ranks}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
