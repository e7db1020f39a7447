"""A training loop of one's own with MarginTask in several processes, on scikit-learn's digits:

    torchrun --nproc-per-node 2 examples/ddp_train.py

The task is what DistributedDataParallel wraps, not the model: the loss then computes its gradients in the forward pass
without DistributedDataParallel taking them for those of the step. On GPUs: "nccl", and the device of LOCAL_RANK.
"""

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import margin_kernels as mk

EPOCHS, BATCH = 15, 64  # images of a batch, all processes together


def main() -> None:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if BATCH % size:  # the mean of the processes' gradients is that of the batch where their parts are equal
        raise SystemExit(f"--nproc-per-node must divide {BATCH}, got {size}")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)

    torch.manual_seed(0)  # the same first weights and the same order on every process
    features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU())
    model = nn.Sequential(features, nn.Linear(64, 10))
    loss = mk.LargeMarginLoss(gamma=[0.5, 2.0], competitors="soft", alpha=1.0, cross_entropy_weight=1.0)
    task = DistributedDataParallel(mk.MarginTask(model, loss, layers=("input", "0")))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)

    for epoch in range(EPOCHS):
        task.train()
        seen = torch.zeros(2, dtype=torch.float64)  # loss, and images that the network is right about
        whole = torch.randperm(1500).split(BATCH)[:-1]  # without the last batch, which is shorter
        for batch in whole:
            own = batch.chunk(size)[rank]
            optimizer.zero_grad()
            out = task(images[own], labels[own])
            out["loss"].backward()
            optimizer.step()
            right = (out["output"].argmax(1) == labels[own]).sum()
            seen += torch.stack([out["loss"].detach().double() * len(own), right.double()])
        distributed.all_reduce(seen)
        if rank == 0:
            error = 1 - float(seen[1]) / (BATCH * len(whole))
            print(f"epoch {epoch + 1}: loss {float(seen[0]) / (BATCH * len(whole)):.3f}, training error {error:.1%}")
    if rank == 0:
        with torch.no_grad():
            wrong = (model.eval()(images[1500:]).argmax(1) != labels[1500:]).double().mean()
        print(f"test error {float(wrong):.1%}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
