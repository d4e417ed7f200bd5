"""Push a run or a merged model to the hub."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from ..config.experiment import Experiment
from ..data.reading import is_hub_name
from ..errors import KitError, either
from ..runs.card import ADAPTER_USE
from ..runs.predictor import Predictor
from ..system.arguments import FLAG, RUN, TEXT, takes
from ..system.files import write_json, write_text
from ..system.manifest import NAME, OF_A_RUN, of
from .card import card
from .merge import merge
from .peft_folder import peft_files

logger = logging.getLogger(__name__)

# What is pushed from a run folder. Checkpoints and data are not, nor is evaluation.json, which quotes test rows: its
# scores are in the card.
PUSHED = ("README.md", "experiment.yaml", "training.json", "environment.json", "adapter", "tokenizer")


@takes(run=RUN, merged=FLAG, repo=TEXT)
@contextlib.contextmanager
def staged(run: Predictor, *, merged: bool = False, repo: str | None = None) -> Iterator[Path]:
    """Put what `push` uploads into a temporary folder for a block, so that you can look at it first.

    Args:
        run: A finished run.
        merged: The merged model instead of the adapters.
        repo: The repository's name on the hub, from where plain PEFT will open it.

    Yields:
        The folder. For a run it holds what `PUSHED` lists, with test scores in the card and without the names of
        folders on this machine, and beside it what plain PEFT opens (see `export_peft`); with `merged`, what `merge`
        writes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if merged:
            merge(run, folder, progress=False)
        else:
            folder.mkdir()
            for name in PUSHED:
                source = run.path / name
                if source.is_dir():
                    shutil.copytree(source, folder / name)
                elif source.is_file():
                    shutil.copyfile(source, folder / name)
            write_text(folder / "experiment.yaml", _without_folders(run.experiment).to_yaml())
            write_text(folder / "README.md", card(run, use=_use(run, folder, repo)))
            write_json(folder / NAME, of(folder, OF_A_RUN))
        yield folder


def _use(run: Predictor, folder: Path, repo: str | None) -> str:
    """Write what plain PEFT opens into a folder, if PEFT can open the run; return the card's lines."""
    if Path(run.experiment.model.name).expanduser().is_dir():
        return ADAPTER_USE  # nobody else has the base, and its folder's name is private
    try:
        return f"{ADAPTER_USE}\n\n{peft_files(run, folder, repo)}"
    except KitError as error:
        logger.warning("Plain PEFT cannot open what is pushed; the kit can: %s", error)
        return ADAPTER_USE


def _without_folders(experiment: Experiment) -> Experiment:
    """Return the experiment with its data files' names only, without their folders."""
    spec = experiment.data
    names = {"data.name": spec.name, "data.test": spec.test, "data.validation": spec.validation}
    return experiment.override({key: _without_folder(name) for key, name in names.items() if isinstance(name, str)})


def _without_folder(name: str) -> str:
    """Return a data file's name without its folder; keep the name of a data set on the hub as it is."""
    return name if is_hub_name(name) else PureWindowsPath(name).name  # splits at both kinds of slashes


def _is_place(name: str) -> bool:
    """Return whether a model's name can only be a path, unlike `owner/name` and `embedded:minilm`."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1


@takes(run=RUN, repo=TEXT, private=FLAG, token=TEXT, merged=FLAG)
def push(run: Predictor, repo: str, *, private: bool = True, token: str | None = None, merged: bool = False) -> str:
    """Upload a run to the hub: the adapters with tokenizer, card and records, or the merged model.

    Before anything is merged, the hub is asked whether it can be reached, who the user is, and whether the repository
    is public.

    Args:
        run: A finished run.
        repo: `owner/name`; created if it does not exist.
        private: Whether the repository is private. An existing public one is refused unless this is False.
        token: The hub's token; None takes the one from `hf auth login` or `HF_TOKEN`.
        merged: Upload the merged model (see `merge`) instead of the adapters.

    Returns:
        The repository's address.

    Raises:
        KitError: Without a network or a login, for a name that the hub does not accept, for a base that nobody else
            has, and when the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise KitError(f"{repo!r} is no name of a repository on the hub: {error}") from error
    if repo.count("/") != 1:
        raise KitError(f"{repo!r} is no name of a repository on the hub: allowed is owner/name")
    base = run.experiment.model.name
    if (_is_place(base) or Path(base).is_dir()) and not merged:
        raise KitError(
            f"the base is the folder {base!r} on this machine: nobody could load adapters to it. Push the whole "
            f"model with {either('merged=True', '--merged')}"
        )
    if constants.HF_HUB_OFFLINE:
        raise KitError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it and call again")
    api = huggingface_hub.HfApi(token=token)
    with _told_by_the_hub(repo):
        if (api.whoami().get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise KitError("this login may only read on the hub: pushing needs a token that may write")
        with contextlib.suppress(errors.RepositoryNotFoundError):
            _refuse_public(api.repo_info(repo), private)
    with staged(run, merged=merged, repo=repo) as folder, _told_by_the_hub(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        # Check again: somebody may have created it in the meantime.
        _refuse_public(api.repo_info(repo), private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {run.experiment.name}")
    return f"{constants.ENDPOINT}/{repo}"


def _refuse_public(found: Any, private: bool) -> None:
    # A repository counts as public unless the hub says that it is private.
    if private and found.private is not True:
        raise KitError(
            f"{found.id} is there already and is public: push to another, or say {either('private=False', '--public')}"
        )


@contextlib.contextmanager
def _told_by_the_hub(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into KitErrors of one line."""
    from huggingface_hub import constants, errors

    http_error: Any = errors.HfHubHTTPError.__bases__[0]  # from httpx or httpx2, depending on the version
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise KitError(
            f"the hub needs a login: call `hf auth login` once, or {either('give a token', 'set HF_TOKEN')}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise KitError(f"the hub has no {repo} that this login may see") from error
    except errors.HfHubHTTPError as error:
        raise KitError(f"the hub refuses {repo}: {' '.join(str(error).split())[:300]}") from error
    except (http_error, ConnectionError) as error:
        raise KitError(
            f"{constants.ENDPOINT} cannot be reached, so nothing is pushed: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
