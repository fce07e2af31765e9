"""Whether the Hugging Face Hub can be reached, and the error where it cannot."""

from huggingface_hub import constants, get_session

from author_dp.errors import UserError


def hub_is_reachable() -> bool:
    """Ask the hub once, without the minute of retries that the libraries spend where there is no network."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library, its proxy, or offline mode raises: it is not to be had
        return False
    return True


def hub_error(option: str, name: str) -> UserError:
    return UserError(
        f"{option} {name} is not a local path and the Hugging Face hub cannot be reached: give local files with --train_file "
        "and a local folder with --model_name, or run the demo (README.md)"
    )
