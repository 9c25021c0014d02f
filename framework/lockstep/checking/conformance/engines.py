"""Engines draw what the policy would, with the weights they were given last.

Whether a run may take an answer, `lockstep.learning.served.checked` tests at every call. These checks are about what one answer
cannot show: which weights drew it, from which distribution, and what else it depends on.
"""

from __future__ import annotations

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from lockstep.checking.conformance.kit import check, near, require, same
from lockstep.checking.conformance.policies.calls import LANGUAGE, ROWS, TEMPERATURE, enumerated
from lockstep.checking.conformance.subjects import EngineSubject
from lockstep.errors import EngineFailed
from lockstep.interfaces import Generated
from lockstep.text.sequences import join

MISMATCH = 0.05
"""Nats: the most by which an engine's log-probabilities may differ from the policy's on average. An engine in bfloat16 is below,
one at another temperature above."""
DRAWS = 400
SIGNIFICANT = 1e-6
"""Probability of a false alarm, if the engine draws from the policy."""


@check("engine", usually="EOS or the server's own stop strings end a response, or max_tokens has a default")
def a_row_without_stop_ids_is_full(subject: EngineSubject) -> None:
    """Without stop ids every response has as many tokens as seeds, whatever the model's own end of text is."""
    found = subject.draw(temperature=1.0, seeds=subject.world.seeds(ROWS, 24))
    require(found.mask.all(), f"{(~found.mask).sum()} of {found.mask.size} tokens are missing")


@check("engine", usually="the server drops the token that ends a response, or one that it takes for special")
def any_stop_id_ends_a_response_and_is_kept(subject: EngineSubject) -> None:
    """If every token ends a response, each response is one token."""
    found = subject.draw(stop_ids=range(subject.policy().vocab_size))
    same("the number of tokens in each row", found.mask.sum(axis=1), np.ones(ROWS))


@check("engine", usually="log-probabilities at temperature 1, of the logits before they are processed, or rounded by the server")
def log_probabilities_are_those_of_the_sampler(subject: EngineSubject) -> None:
    """They are the policy's, at the temperature of the call."""
    for temperature in (1.0, TEMPERATURE):
        agree(subject, 0, subject.draw(temperature=temperature), temperature)


def agree(subject: EngineSubject, number: int, found: Generated, temperature: float) -> None:
    """Require that the log-probabilities are those of weights ``number``."""
    rows = join(*subject.prompts(), found.tokens, found.mask)
    forced = subject.policy(number).evaluate(rows, LANGUAGE, temperature=temperature)["logprobs"]
    apart = np.abs(found.logprobs - forced)[found.mask].mean()
    near(f"the mean difference of log-probabilities at temperature {temperature}", apart, 0, MISMATCH)


@check("engine", usually="the server's default of top_k, top_p, min_p or a repetition penalty, or another temperature")
def tokens_are_drawn_from_the_policy(subject: EngineSubject) -> None:
    """Over many first tokens after one prompt, each comes as often as the policy's probabilities predict."""
    tokens, mask = (array[4:5] for array in subject.prompts())
    found = subject.draw(prompts=(tokens.repeat(DRAWS, 0), mask.repeat(DRAWS, 0)), seeds=subject.world.seeds(DRAWS, 1))
    rows = join(tokens, mask, found.tokens[:1], found.mask[:1])
    (logprobs,) = enumerated(subject.policy(), rows, 0, TEMPERATURE)
    expected = DRAWS * np.exp(logprobs)
    counts = np.bincount(found.tokens[:, 0], minlength=len(expected))
    rare = expected < 5
    groups = [np.append(each[~rare], each[rare].sum()) for each in (counts, expected)]
    kept = groups[1] > 1
    surprise = float(((groups[0] - groups[1])[kept] ** 2 / groups[1][kept]).sum())
    p = float(special.chdtrc(max(int(kept.sum()) - 1, 1), surprise))
    token = int(np.argmax(np.abs(counts - expected)))
    require(
        p > SIGNIFICANT,
        f"of {DRAWS} draws, token {token} came {counts[token]} times where {expected[token]:.0f} were expected; a deviation as "
        f"large as all tokens' has probability {p:.1g}",
    )


@check("engine", usually="temperature 0 is passed on as it is, or replaced by a default")
def temperature_zero_takes_the_most_likely(subject: EngineSubject) -> None:
    """At temperature 0 each token is the most likely one, and its log-probability is finite."""
    found = subject.draw(temperature=0.0)
    require(np.isfinite(found.logprobs).all(), f"log-probabilities at temperature 0: {found.logprobs[0].tolist()}")
    some = slice(0, 4)
    rows = join(*subject.prompts(), found.tokens, found.mask).take(some)
    for column in (0, 3):
        logprobs = enumerated(subject.policy(), rows, column)
        short = logprobs.max(axis=1) - logprobs[np.arange(len(logprobs)), found.tokens[some, column]]
        require(short.max() < 2 * MISMATCH, f"a token in column {column} is {short.max():.3g} nats below the most likely one")


@check("engine", usually="weights are read later, from a folder that is gone; or the keys and values of older weights are reused")
def the_newest_weights_draw(subject: EngineSubject) -> None:
    """After each hand-over the answer is that of the new weights, for prompts that the old ones have answered too, and carries
    their version. The folder of the weights is gone by then."""
    for number in (0, 1, 0):
        agree(subject, number, subject.draw(number), TEMPERATURE)


@check("engine", usually="padding is part of the prompt, or shifts its positions")
def padding_changes_nothing(subject: EngineSubject) -> None:
    """More padding before the prompts changes no first token at temperature 0, nor its log-probability by more than rounding."""
    tokens, mask = subject.prompts()
    wide = [np.pad(array, ((0, 0), (5, 0)), constant_values=fill) for array, fill in ((tokens, 3), (mask, False))]
    alike("more padding", subject.draw(temperature=0.0, prompts=(wide[0], wide[1])), subject.draw(temperature=0.0))


@check("engine", usually="answers come back in the order in which the server finished them, or rows share a state")
def a_row_depends_on_its_own_prompt(subject: EngineSubject) -> None:
    """Fewer rows in another order give each prompt the same first token at temperature 0."""
    tokens, mask = subject.prompts()
    order = [6, 1, 2]
    whole = subject.draw(temperature=0.0)
    some = subject.draw(temperature=0.0, prompts=(tokens[order], mask[order]))
    alike("fewer rows", some, Generated(*(array[order] for array in (whole.tokens, whole.mask, whole.logprobs))))


def alike(what: str, found: Generated, expected: Generated) -> None:
    """Require the first tokens to be equal; later ones may follow a tie that rounding decided."""
    same(f"first tokens with {what}", found.tokens[:, 0], expected.tokens[:, 0])
    near(f"their log-probabilities with {what}", found.logprobs[:, 0], expected.logprobs[:, 0], MISMATCH)


@check("engine", usually="a generator of the server's own; pass the seeds on, or log that tokens do not follow from them")
def tokens_follow_from_the_seeds_or_it_says_so(subject: EngineSubject) -> None:
    """Equal seeds draw equal tokens and others draw others, or the engine has logged a warning about its seeds. A repeated run
    then differs, and whoever runs it should know."""
    seeds = [subject.world.seeds(ROWS, 6, step) for step in (0, 0, 1)]
    first, again, other = (subject.draw(temperature=1.0, seeds=each) for each in seeds)
    different = float((first.tokens != other.tokens).mean())
    follows = (first.tokens == again.tokens).all() and different > 0.2
    changed = float((first.tokens != again.tokens).mean())
    found = f"with equal seeds {changed:.0%} of the tokens differ, with others {different:.0%}"
    told = any("seed" in message for message in subject.logged)
    require(follows or told, f"{found}, and the engine has logged no warning about seeds")


@check("engine", usually="an error of the server's library, which ends a run without saying what to do")
def weights_that_cannot_be_loaded_are_an_error(subject: EngineSubject) -> None:
    """A folder without weights raises `EngineFailed`, and afterwards the engine takes weights again."""
    empty = subject.world.folder / "no weights"
    empty.mkdir(exist_ok=True)
    subject.version = None
    refused = False
    try:
        subject.engine.load(empty, "no weights")
    except EngineFailed:
        refused = True
    require(refused, "it loaded a folder that holds 0 files")
    agree(subject, 1, subject.draw(1), TEMPERATURE)
