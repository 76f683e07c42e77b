"""Finetune the routers and the shared weights of a merged model on a mixture of texts.

make demo                     # makes demo/fitted; or name your own merged model below
python examples/finetune.py
"""

from btx_merge import DomainText, Options, Reporter, TrainRecipe, train


class Console(Reporter):
    """Prints the lines by which a person follows a finetuning."""

    def line(self, text: str) -> None:
        print(text)


recipe = TrainRecipe(
    model="demo/fitted",
    data=(
        DomainText("code", ("demo/texts/code.jsonl",), weight=2),  # twice as many tokens as of each other domain
        DomainText("english", ("demo/texts/english.jsonl",)),
        DomainText("math", ("demo/texts/math.jsonl",)),
    ),
    train="shared",  # or routers, all, lora
    max_length=128,
    arguments={"max_steps": 20, "learning_rate": 3e-4, "report_to": "none"},  # of transformers.TrainingArguments
)
report = train(recipe, "demo/my-trained", Options(overwrite=True), Console())
print(f"{report.entry['steps']} steps on {report.entry['tokens']:,} tokens; the model is in {report.output}")
