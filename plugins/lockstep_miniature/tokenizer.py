"""Word-level tokens: each word of the miniature is one token, so that small models read short sequences.

The vocabulary is every word that the world can write, collected from its own tables.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from lockstep_miniature import corpus, responses, tasks, world

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNK, "<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '> ' + message.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


_TABLES: tuple[Iterable[str], ...] = (
    SPECIAL,
    *world.CATEGORIES.values(),
    world.CREATURES,
    world.KIND_DEEDS,
    world.HARMFUL_DEEDS,
    *((*r.questions, r.follow_up, r.statement) for r in world.RELATIONS),
    *((*m.openers, *m.closers) for m in tasks.MANNERS.values()),
    tasks.ASKS.values(),
    tasks.FRAMES.values(),
    (tasks.SUM,),
    *tasks.PLAIN_REQUESTS,
    *tasks.DISGUISED_REQUESTS,
    responses.EVASIONS,
    responses.COUNTER_QUESTIONS,
    responses.SPAM,
    responses.INSULTS,
    responses.DIGRESSIONS,
    responses.WEAK_REFUSALS,
    (responses.UNCALLED_REFUSAL,),
    corpus.NAMES,
    corpus.TIMES,
    corpus.WENT,
    corpus.SAW,
    corpus.FELT,
    corpus.LOOKS,
    corpus.ENDINGS,
    (corpus.STORY, corpus.LISTS, corpus.COUNTING, corpus.COPYING, corpus.PATTERN, corpus.RANT),
)


def vocabulary() -> list[str]:
    """The words in the order of their ids. Text in braces is a blank, not a word."""
    words = (word for table in _TABLES for text in table for word in text.split())
    return [word for word in dict.fromkeys(words) if not word.startswith("{")]


def build_tokenizer(words: Iterable[str]) -> Tokenizer:
    """The Hugging Face tokenizer of these words, in the order of their ids. It has no decoder, so it decodes to words separated
    by spaces."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
