"""Users' own data as the nouns of RLHF.

``reading.py`` turns files and Hugging Face data sets into rows. ``columns.py`` turns rows into prompts, demonstrations and
comparisons: ``conventions.py`` knows the columns of public data sets, ``messages.py`` the dialogues in them. ``mixing.py`` mixes
several sources, and ``files.py`` is the data source ``files`` that does all of this.
Numpy only: neither torch nor jax, and ``datasets`` is imported only when a source needs it.
"""
