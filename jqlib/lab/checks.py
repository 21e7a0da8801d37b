"""What can't be right is said before a run begins: its device, model, text, folder and kernel."""

import re
import sys
from pathlib import Path

import torch
from jupyter_client.kernelspec import KernelSpecManager
from torch import Tensor

from jqlib.config import Config
from jqlib.inputs import evaluation_windows, text_for
from jqlib.model.families import rotated_sizes
from jqlib.model.load import folder_of, load_config
from jqlib.model.stream import files_of
from jqlib.store import check_place
from jqlib.transform.hadamard import block_order
from jqlib.transform.selfcheck import check_family

RUN = 13  # tokens in a row that hardly come twice in texts that do not share a source
FEW = 0.001  # of them that are no news


def check_inputs(config: Config) -> None:
    """A device or model that is missing or not supported, or a text too short, fails here and not after an hour."""
    check_device(config.device)
    shape, folder = load_config(config.model), Path(config.model).expanduser()
    for name, size in rotated_sizes(shape).items():
        try:
            block_order(size)
        except ValueError as error:
            raise ValueError(f"{config.model}: {name} can't be a rotation of {size} channels: {error}") from error
    check_family(shape)
    if config.stream:
        files_of(folder_of(config.model))
    if folder.is_dir() and config.folder.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output_dir={config.output_dir!r}: results would go into the model's own folder, {folder}")
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"{folder} has no weights: expected *.safetensors or *.bin")
    longest = max(config.seqlen, config.eval_seqlen)
    if longest > shape.max_position_embeddings:
        print(f"warning: windows of {longest} tokens: the model is for {shape.max_position_embeddings} at most")
    tokens = max(config.nsamples * config.seqlen, config.refine_steps * config.step_tokens)
    learned, evaluated = text_for(config, tokens, config.nsamples), evaluation_windows(config)
    if (largest := max(learned.max().item(), evaluated.ids.max().item())) >= shape.vocab_size:
        raise ValueError(f"{config.model}: its tokenizer gives the token {largest}, but the model knows "
                         f"{shape.vocab_size}: is the tokenizer its own?")  # fmt: skip
    if (share := shared(learned, evaluated.ids)) > FEW:
        print(f"warning: {share:.1%} of the evaluation text's runs of {RUN} tokens are in the calibration text too: "
              "expect perplexities that are too good")  # fmt: skip
    if len({*evaluated.articles}) < 2:
        print("warning: all evaluation windows are from one article: no interval. Ask for more by --eval_windows")
    check_place(config.folder, "output_dir")


def check_device(device: str) -> None:
    """Raises ValueError for a torch device that can't compute here."""
    try:
        torch.empty(1, device=device).add(1).cpu()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={device!r} can't be used here: {str(error).splitlines()[0]}") from error


def shared(learned: Tensor, evaluated: Tensor) -> float:
    """The share of runs of RUN tokens in windows (windows, seqlen) that are in others too."""

    def runs(windows: Tensor) -> Tensor:
        count, found = max(0, windows.shape[1] - RUN + 1), torch.zeros(1, dtype=torch.long)
        for k in range(RUN):
            found = found * 6_364_136_223_846_793_005 + windows[:, k : k + count] + 1  # modulo 2^64
        return found.flatten()

    return torch.isin(runs(evaluated), runs(learned)).double().mean().nan_to_num().item()


def check_kernel() -> None:
    """ValueError if the notebooks would run in another Python than this one."""
    spec = KernelSpecManager().get_kernel_spec("python3")
    python, ours = spec.argv[0], sys.executable
    if not re.fullmatch(r"python[\d.]*", python) and Path(python).absolute().parent != Path(ours).absolute().parent:
        where = f"the kernel python3 in {spec.resource_dir} is another Python, {python}"
        raise ValueError(f"{where}, not {ours}: unset JUPYTER_PATH, or run python -m ipykernel install --sys-prefix")
