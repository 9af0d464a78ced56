"""Where a model's folder is: the bundled one, a local path, or a download from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from reelbatch.wording import printable

REAL_MODEL = "hunyuanvideo-community/HunyuanVideo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"


class ModelFolderError(ValueError):
    """A model folder that cannot be used: the message names the file and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.splitlines())))  # files may hold escape sequences


def resolve(model: str | Path, download: bool = True) -> Path:
    """The folder of a model: "demo" (the bundled one), a local path, or a hub id, which is downloaded if need be.

    Where that holds a transformer alone, as SkyReels V1's do, the rest is that of the model it was trained from, or of
    the one named after a plus sign: "TRANSFORMER+BASE".

    Args:
        download: whether what is not here is fetched.

    Raises:
        ModelFolderError: if there is no such folder and none can be fetched.
    """
    if model == "demo":
        if not (DEMO_FOLDER / "model_index.json").is_file():
            raise ModelFolderError(f"{DEMO_FOLDER}: the bundled model is not part of this installation; install again")
        return DEMO_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _whole(folder, None, download)
    transformer, plus, base = str(model).rpartition("+")
    if plus and transformer:
        return _whole(_part(transformer, download), base, download)
    return _whole(_part(model, download), None, download)


def resolve_here(model: str | Path) -> Path:
    """As `resolve`, but nothing is downloaded, and a path where there is no folder stays as it is.

    Raises:
        ModelFolderError: for a transformer alone, if the rest of its model is not here.
    """
    folder = Path(model).expanduser()
    if model == "demo" or folder.is_dir() or "+" in str(model):
        return resolve(model, download=False)
    return folder


def _part(model: str | Path, download: bool) -> Path:
    """As `resolve`, of a whole model or of a transformer alone, as it lies."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelFolderError(
            f"{folder}: is a file; give the model folder, the one with model_index.json in it, or make one of the "
            "file (reelbatch convert)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        raise ModelFolderError(f"{folder}: no such folder; give a model folder, a hub id such as {REAL_MODEL}, or demo")
    return _download(str(model), download)


def _whole(folder: Path, base: str | None, download: bool) -> Path:
    """The folder itself, or one with the rest of the model in it."""
    from reelbatch.loading.assembly import assemble, base_of, transformer_config

    config = transformer_config(folder)
    if config is None:
        if base is not None:
            raise ModelFolderError(f"{folder}: is no folder of a HunyuanVideo transformer alone, to add {base} to")
        return folder
    try:
        return assemble(folder, config, _part(base or base_of(config), download), model_name(folder))
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{folder}: is a transformer alone, and the rest of its model cannot be had: {error}. Give the folder of "
            f"{base_of(config)} after a plus sign: {folder}+FOLDER"
        ) from None


def _download(repository: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from reelbatch.loading.assembly import TRANSFORMER_FILES
    from reelbatch.loading.families import COMPONENTS

    wanted = ["model_index.json", "reelbatch.json", *(f"{component}/*" for component in COMPONENTS)]
    try:
        if not download:
            return Path(snapshot_download(repository, local_files_only=True))
        folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.bin", "*.onnx"]))
        if not (folder / "model_index.json").is_file():  # a transformer alone
            snapshot_download(repository, allow_patterns=["reelbatch.json", *TRANSFORMER_FILES])
        return folder
    except GatedRepoError:
        remedy = "its owner asks you to accept terms on the model's page first, and to log in (hf auth login)"
    except RepositoryNotFoundError:
        remedy = "the hub has no such model (or it is private: hf auth login)"
    except Exception as error:  # the hub's, the HTTP library's, the file system's
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            f"it could not be fetched from the hub ({first_line}). Where the network does not allow it, download the "
            f"model elsewhere (hf download {repository} --local-dir FOLDER), copy it here and give its path"
        )
    raise ModelFolderError(f"{repository}: there is no such folder here, and {remedy}") from None


def model_name(folder: Path) -> str:
    """What to call a model: "demo", the hub id of a cached download, or the folder's name."""
    if folder == DEMO_FOLDER:
        return "demo"
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
