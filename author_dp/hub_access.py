"""Check whether the Hugging Face Hub is reachable, and make the error for when it is not."""

from huggingface_hub import constants, get_session

from author_dp.errors import UserError


def hub_is_reachable() -> bool:
    """Return whether the Hub answers one request. Without a network, the libraries would retry for a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # depends on the HTTP library, its proxy and offline mode
        return False
    return True


def hub_error(option: str, name: str) -> UserError:
    """Return the error for a name that is no local path while the Hub is unreachable."""
    return UserError(
        f"{option} {name}: it is no local path, and the Hugging Face hub cannot be reached. Give local files with --train_file "
        "and a local folder with --model_name, or run the demo (README.md)"
    )
