"""Write the model card of a result, with Hugging Face's metadata.

It says how to load the model, its guarantee and its settings. It holds public values only.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import TrainingArguments

from author_dp.models.sizes import model_sizes
from author_dp.outputs.guarantee import (
    Row,
    guarantee_in_words,
    guarantee_is_tuned,
    guarantee_table_rows,
    report_has_guarantee,
    summarize_guarantee,
)
from author_dp.wording import format_number

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
OPTIONS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "bf16")
IMPORTS = {
    "peft": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer",
}


def model_card_settings(args: TrainingArguments, model: Any, model_name: Optional[str]) -> dict[str, Any]:
    """Return the options of a run that privacy.json names under no other key.

    Args:
        model_name: hub name or local folder; the path of a folder is left out.
    """
    settings: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    trained, parameters = model_sizes(model)
    settings |= {"architecture": type(base).__name__, "parameters": parameters, "trained_parameters": trained}
    is_local = not model_name or Path(model_name).exists() or Path(model_name).is_absolute()
    settings["model_name"] = None if is_local else model_name
    if config := getattr(model, "peft_config", {}).get("default"):
        targets = config.target_modules
        settings["lora"] = {
            "lora_dim": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": targets if isinstance(targets, str) else sorted(targets or []),
        }
    return settings


def model_card_options(report: dict[str, Any]) -> dict[str, Any]:
    """Return the options and the data of a run, by name; base_model and dataset are None unless they have a public name.

    Args:
        report: content of privacy.json.
    """
    settings, data = dict(report.get("settings") or {}), report.get("data") or {}
    base_model, lora = settings.pop("model_name", None), settings.pop("lora", {})
    return {"base_model": base_model, "dataset": data.get("dataset"), **data, **lora, **settings}


def model_card(report: dict[str, Any], name: str = ".") -> str:
    """Return the model card as Markdown.

    Args:
        report: content of privacy.json.
        name: hub name or path that the model is loaded by.
    """
    covered, is_adapter = report_has_guarantee(report), bool(report.get("adapter_base"))
    library, options = "peft" if is_adapter else "transformers", model_card_options(report)
    base_model, dataset = options["base_model"], options["dataset"]
    metadata = ModelCardData(
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["text-generation", *(["differential-privacy", "author-level-dp"] if covered else [])],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title="Fine-tuned with author-level differential privacy" if covered else "Fine-tuned without a privacy guarantee",
        summary="\n\n".join(filter(None, (summarize_guarantee(report), guarantee_in_words(report)))),
        imports=IMPORTS[library],
        model_class="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        name=name,
        needs_base_path=is_adapter and not base_model,
        tuned=guarantee_is_tuned(report),
        counts_are_hidden=report["num_authors"] is None,
        guarantee=model_card_table_rows(guarantee_table_rows(report)),
        settings=model_card_table_rows(
            (option, value) for option, value in {"date": report.get("started"), **options}.items() if value is not None
        ),
    )
    return str(card)


def model_card_table_rows(rows: Iterable[tuple[str, Any]]) -> list[Row]:
    """Return the rows of a Markdown table as text that cannot leave its cell."""
    return [(name, format_model_card_value(value).replace("|", r"\|").replace("\n", " ")) for name, value in rows]


def format_model_card_value(value: Any) -> str:
    """Return an option's value for people: numbers with separators of thousands."""
    return f"{value:,}" if type(value) is int else format_number(value) if isinstance(value, float) else str(value)
