"""A task whose parameters FSDP2 shards over the processes, on scikit-learn's digits:

    torchrun --nproc-per-node 2 examples/fsdp_train.py

The checkpoint has the keys of the plain model and is loaded here by one process alone. On GPUs: init_process_group()
without a backend, and the device of LOCAL_RANK.
"""

import tempfile

import torch
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import distributed, nn

import margin_kernels as mk
from margin_kernels.distributed import fully_shard_task

EPOCHS, BATCH = 15, 64  # images of a batch, all processes together


def network() -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(width, 128), nn.LayerNorm(128), nn.ReLU()) for width in (64, 128, 128)]
    return nn.Sequential(*blocks, nn.Linear(128, 10))


def main() -> None:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)  # the same first weights and the same order on every process
    loss = mk.presets.standard(process_group="world")  # of the whole batch, whatever part of it a process has
    task = fully_shard_task(mk.MarginTask(network(), loss, layers=("input", "1", "3")), units=("0", "1", "2"))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        mean = torch.zeros(2)
        for batch in torch.randperm(1500).split(BATCH):
            own = batch.tensor_split(size)[rank]
            optimizer.zero_grad()
            out = task(images[own], labels[own])
            out["loss"].backward()
            optimizer.step()
            mean += torch.tensor([(out["output"].argmax(1) != labels[own]).sum(), len(own)])
        distributed.all_reduce(mean)
        if rank == 0:
            print(f"epoch {epoch + 1}: training error {float(mean[0] / mean[1]):.1%}")
    distributed.broadcast_object_list(folder := [tempfile.mkdtemp()])
    dcp.save({"model": task.model.state_dict()}, checkpoint_id=folder[0])
    if rank == 0:
        state = {"model": (plain := network()).state_dict()}
        dcp.load(state, checkpoint_id=folder[0], no_dist=True)
        plain.load_state_dict(state["model"])
        print(f"test error {float((plain(images[1500:]).argmax(1) != labels[1500:]).double().mean()):.1%}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
