"""What a run will take, before anything is rented: GiB by role and phase, seconds a step, hours. Nothing is run.

work.py       a step's rows and tokens, from the real images' sizes and the prompts' lengths
memory.py     bytes of learners, engines and transfers (the model's part of the formulas is `model/shapes.py`)
seconds.py    seconds by phase, from FLOPs and bytes and a card's rates (`cards.py`)
advice.py     what to change if it does not fit
report.py     the whole plan as text
"""
