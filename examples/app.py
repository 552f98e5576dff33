"""The page of `budwood app` for a hosted Space.

The Space's requirements.txt is this line::

    budwood[app,points,sprout,tune]

The small text models of the embedded models come from the hub there. The variables MODEL, ADAPTER
and TUNED of the Space name models of your own, as --model, --adapter and --tuned do.
"""

import os

from budwood.app import Sources, serve

if __name__ == "__main__":
    sources = Sources(
        model=os.environ.get("MODEL"),
        adapter=os.environ.get("ADAPTER"),
        tuned=os.environ.get("TUNED"),
    )
    serve(sources, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
