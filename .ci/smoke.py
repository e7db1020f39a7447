"""Is what was installed what it should be? Run outside of the source folder: python smoke.py compiled|plain

compiled: the compiled kernels are there and right.   plain: they are not there, and an error names the remedy.
"""

import subprocess
import sys

import torch

import margin_kernels as mk
from margin_kernels import backends

compiled = {"compiled": True, "plain": False}[sys.argv[1]]
assert "site" in mk.__file__, f"not the installed package: {mk.__file__}"
assert (backends.EXTENSION is not None) == compiled, backends.EXTENSION_ERROR

# z = (1, 0, 0), y = 0: nll = log(e + 2) - 1.
logits = torch.eye(3, requires_grad=True)
result = mk.functional.competitors(logits, torch.tensor([0, 1, 2]))
result.nll.sum().backward()
assert abs(result.nll[0].item() - 0.5514447) < 1e-6, result.nll
softmax = torch.eye(3).softmax(1)
assert torch.allclose(logits.grad, softmax - torch.eye(3), atol=1e-6), logits.grad

# z = W x with W = I: the distance of x = (1, 0) to the boundary is 1 / sqrt 2, the loss is gamma minus that.
model = torch.nn.Linear(2, 2, bias=False)
torch.nn.init.eye_(model.weight)
task = mk.MarginTask(model, mk.LargeMarginLoss(gamma=1.0, eps=0.0), layers=("input",))
out = task(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
out["loss"].backward()
assert abs(out["loss"].item() - (1 - 0.5**0.5)) < 1e-6, out["loss"]
assert model.weight.grad.abs().sum() > 0

refused = ""
try:
    found = mk.functional.competitors(logits, torch.tensor([0, 1, 2]), backend="cpu")
    assert torch.equal(found.competitor.flatten(), torch.tensor([1, 0, 0]))
except mk.BackendError as error:
    refused = str(error)
    print("without the extension:", refused)
assert ("was not built: reinstall with" in refused) != compiled, refused

command = subprocess.run([sys.executable, "-m", "margin_kernels.experiments", "--help"], capture_output=True, text=True)
without_extra = command.returncode == 1 and 'pip install "margin_kernels[experiments]"' in command.stderr
assert command.stdout.startswith("usage: margin-kernels COMMAND") or without_extra, command
print(f"margin_kernels {mk.__version__} for torch {torch.__version__}: {sys.argv[1]}, as it should be")
