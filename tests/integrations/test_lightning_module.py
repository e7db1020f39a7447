"""MarginModule and MonitorCallback in Lightning's own Trainer, in one process and in two."""

import csv

import pytest
import torch
from support.processes import Processes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import margin_kernels as mk

pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from margin_kernels.integrations.lightning import MarginModule, MonitorCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*num_workers.*")
ROWS, BATCH, CLASSES, LAYERS = 24, 8, 5, ("input", "1")


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def task_of(layers=LAYERS):
    loss = mk.LargeMarginLoss(1.5, competitors="soft", cross_entropy_weight=1.0)
    return mk.MarginTask(network(), loss, layers)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (ROWS,), generator=generator))


class Mappings(torch.utils.data.Dataset):
    """The same with names."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        x, y = data()[i]
        return {"input": x, "labels": y}


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **{"max_epochs": 1, "logger": False, "log_every_n_steps": 1, **options},
    )


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def by_hand(epochs=1, layers=LAYERS):
    """The task after three steps an epoch, and the losses."""
    task, losses = task_of(layers), []
    optimizer = sgd(task.parameters())
    for _ in range(epochs):
        for x, y in DataLoader(data(), BATCH):
            optimizer.zero_grad()
            loss = task(x, y)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return task, losses


def same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance)


def test_fit_is_a_loop_by_hand_and_logs_what_was_measured(tmp_path):
    module = MarginModule(task_of(), sgd)
    logger = CSVLogger(tmp_path, "", "")
    loader = DataLoader(data(), BATCH)
    trainer(tmp_path, logger=logger).fit(module, loader, DataLoader(data(), ROWS))
    expected, losses = by_hand()
    same(module.task.model, expected.model)
    rows = rows_of(tmp_path)
    train = [row for row in rows if row["train/loss"]]
    assert [float(row["train/loss"]) for row in train] == pytest.approx(losses)
    assert {"train/distance/input", "train/distance/1"} <= set(rows[0])
    (validated,) = (row for row in rows if row["val/loss"])
    with torch.no_grad():
        wanted = expected(*data()[:])
    assert float(validated["val/loss"]) == pytest.approx(wanted["loss"].item())


def test_test_measures_everything(tmp_path):
    module = MarginModule(task_of(), sgd)
    (found,) = trainer(tmp_path).test(module, DataLoader(data(), BATCH), verbose=False)
    task = task_of()
    measured = [task(x, y) for x, y in DataLoader(data(), BATCH)]
    assert found["test/loss"] == pytest.approx(sum(out["loss"].item() for out in measured) / 3)
    assert {f"test/{name}" for name in task.log(measured[0])} == found.keys()
    for i, name in enumerate(LAYERS):
        mean = sum(out["distance"][..., i].mean().item() for out in measured) / 3
        assert found[f"test/distance/{name}"] == pytest.approx(mean)


def test_a_mapping_is_a_batch_of_keywords(tmp_path):
    module = MarginModule(task_of(("1",)), sgd)
    trainer(tmp_path).fit(module, DataLoader(Mappings(), BATCH))
    same(module.task.model, by_hand(layers=("1",))[0].model)
    with pytest.raises(ValueError, match=r"batch must hold one of labels, .*, got \['x'\]: override"):
        module.unpacked({"x": 1})
    with pytest.raises(ValueError, match=r"batch must be \(x, y\) or a mapping, got Tensor"):
        module.unpacked(torch.zeros(3))
    with pytest.raises(TypeError, match="task must be a MarginTask, got Sequential"):
        MarginModule(network(), sgd)


def test_a_compiled_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compile its task, module\.task\.compile"):
        trainer(tmp_path).fit(torch.compile(MarginModule(task_of(), sgd)), DataLoader(data(), BATCH))


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    module = MarginModule(task_of(), sgd)
    first = trainer(tmp_path)
    first.fit(module, DataLoader(data(), BATCH))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = MarginModule(task_of(), sgd)
    trainer(tmp_path, max_epochs=2).fit(again, DataLoader(data(), BATCH), ckpt_path=tmp_path / "last.ckpt")
    same(again.task.model, by_hand(2)[0].model)


def fit(rank, size, folder):
    """What a process of `size` has after an epoch on its part of each batch, and what is logged."""
    module = MarginModule(task_of(), sgd)
    plugins = [Environment(rank, size)]
    found = trainer(folder, strategy="ddp", num_nodes=size, plugins=plugins, use_distributed_sampler=False)
    order = torch.arange(ROWS).view(3, BATCH).chunk(size, 1)[rank].flatten()
    own = TensorDataset(*(tensor[order] for tensor in data().tensors))
    found.fit(module, DataLoader(own, BATCH // size), DataLoader(own, BATCH // size))
    weights = {name: value.detach().clone() for name, value in module.task.model.state_dict().items()}
    logged = {name: float(value) for name, value in found.callback_metrics.items()}
    (tested,) = found.test(module, DataLoader(own, BATCH // size), verbose=False)
    watched = trainer(
        folder, strategy="ddp", num_nodes=size, plugins=[Environment(rank, size)], use_distributed_sampler=False,
        callbacks=[MonitorCallback(("0", "output"))],
    )  # fmt: skip
    watched.fit(Plain(), DataLoader(own, BATCH // size))
    margins = {name: float(value) for name, value in watched.callback_metrics.items() if name.startswith("margin/")}
    return weights, logged, tested, type(found.strategy).__name__, margins


def Environment(rank, size):
    """Processes that run already, each a node of its own."""
    from lightning.pytorch.plugins.environments import LightningEnvironment

    class Started(LightningEnvironment):
        creates_processes_externally = True

        def world_size(self):
            return size

        def global_rank(self):
            return rank

        def local_rank(self):
            return 0

        def node_rank(self):
            return rank

        def set_world_size(self, size):
            pass

        def set_global_rank(self, rank):
            pass

    return Started()


def test_two_processes_train_like_one(tmp_path):
    processes = Processes(2)
    try:
        found = processes.run(fit, str(tmp_path))
    finally:
        processes.stop()
    expected, _ = by_hand()
    with torch.no_grad():
        validation = sum(expected(x, y)["loss"].item() for x, y in DataLoader(data(), BATCH)) / 3
    whole = expected.evaluate(*data()[:])
    (summary,) = monitored(1)[1]
    for weights, logged, tested, strategy, margins in found:
        assert strategy == "DDPStrategy"
        torch.testing.assert_close(weights, dict(expected.model.state_dict()), rtol=1e-12, atol=1e-12)
        assert logged["val/loss"] == pytest.approx(validation)
        assert tested["test/loss"] == pytest.approx(whole["loss"].item())
        assert tested["test/distance/1"] == pytest.approx(whole["distance"][..., 1].mean().item())
        assert margins == pytest.approx(named(summary))


class Plain(LightningModule):
    """Ordinary training with cross-entropy."""

    def __init__(self):
        super().__init__()
        self.model = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return sgd(self.model.parameters())


def monitored(epochs):
    """The network after ordinary training, and what MarginMonitor says of each epoch, by hand."""
    module, found = Plain(), []
    optimizer = module.configure_optimizers()
    with mk.MarginMonitor(module.model, ("0", "output")) as monitor:
        for _ in range(epochs):
            for batch in DataLoader(data(), BATCH):
                optimizer.zero_grad()
                module.training_step(batch, 0).backward()
                optimizer.step()
            found.append(monitor.summary(quantiles=(0.05, 0.5, 0.95)))
            monitor.reset()
    return module.model, found


def named(summary):
    """A summary by the names under which it is logged."""
    found = {}
    for i, layer in enumerate(("0", "output")):
        found |= {f"margin/{layer}/mean": summary.mean[i].item(), f"margin/{layer}/right": summary.right[i].item()}
        found |= {f"margin/{layer}/q{q}": summary.quantiles[i, j].item() for j, q in enumerate((5, 50, 95))}
    return found


def test_the_monitor_logs_the_margins_of_each_epoch(tmp_path):
    expected, wanted = monitored(2)
    module, callback = Plain(), MonitorCallback(("0", "output"))
    logger = CSVLogger(tmp_path, "", "")
    loader = DataLoader(data(), BATCH)
    trainer(tmp_path, logger=logger, max_epochs=2, callbacks=[callback]).fit(module, loader, loader)
    same(module.model, expected, 0)
    rows = [row for row in rows_of(tmp_path) if row["margin/0/mean"]]
    assert len(rows) == 2
    for row, summary in zip(rows, wanted, strict=True):
        logged = {name: float(value) for name, value in row.items() if name.startswith("margin/")}
        assert logged == pytest.approx(named(summary), rel=1e-6)
    assert not module.model[0]._forward_hooks and not module.model._forward_hooks  # it is gone again


def test_the_monitor_is_told_which_network(tmp_path):
    class Other(Plain):
        def __init__(self):
            super().__init__()
            self.net = self.model
            del self.model

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self.net.parameters())

    loader = DataLoader(data(), BATCH)
    with pytest.raises(ValueError, match="Other has no attribute `model`"):
        trainer(tmp_path, callbacks=[MonitorCallback("0")]).fit(Other(), loader)
    callback = MonitorCallback("0", network=lambda module: module.net)
    found = trainer(tmp_path, callbacks=[callback])
    found.fit(Other(), loader)
    assert "margin/0/q5" in found.callback_metrics
