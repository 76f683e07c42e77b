"""Fit the routers of a merged model on text of each domain, without training.

make demo                # makes demo/btx; or name your own merged model below
python examples/fit.py
"""

from btx_merge import DomainText, FitRecipe, Options, fit

recipe = FitRecipe(
    model="demo/btx",
    domain_text=(
        DomainText("code", ("demo/texts/code.jsonl",)),
        DomainText("english", ("demo/texts/english.jsonl",)),
        DomainText("math", ("demo/texts/math.jsonl",)),
    ),
    domain_tokens=20_000,  # of each domain, from the beginning of its text
)
report = fit(recipe, "demo/my-fitted", Options(overwrite=True))

print(f"fitted in {report.seconds:.1f} s; held-out tokens that go to their own domain's expert first:")
for layer in report.layers:
    print(f"layer {layer.layer}: {layer.accuracy:.0%}")
