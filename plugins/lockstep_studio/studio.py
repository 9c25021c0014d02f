"""Everything that the pages of one studio share."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import jinja2

from lockstep.errors import ConfigError, LockstepError, listing
from lockstep.text.visible import visible
from lockstep_studio import sources
from lockstep_studio.generator import Generator, PolicySpeaker, Speaker
from lockstep_studio.security import Keys, Passwords, Rates
from lockstep_studio.settings import StudioConfig
from lockstep_studio.store import conversations, people, privacy, rounds, screening
from lockstep_studio.store.database import Database

log = logging.getLogger("lockstep")

SECONDS_BETWEEN_SCANS = 5.0
"""Pause between scans of the runs for stages that wait for labels, and for new policies."""
HERE = Path(__file__).parent


@dataclass
class Studio:
    """The state of one studio, which all its pages share.

    Args:
      runs: run folders, or checkpoints of policies.
      opened: makes the speaker of a policy, for tests; None: load the policy from its run.
    """

    folder: Path
    settings: StudioConfig
    runs: Sequence[Path] = ()
    backend: str | None = None
    opened: Callable[[str], Speaker] | None = None
    clock: Callable[[], float] = time.time
    problem: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.database = Database(self.folder)
        self.keys, self.passwords = Keys(self.folder), Passwords()
        self.cookie = f"{'__Host-' if self.settings.https else ''}{self.keys.cookie}"
        self.rates = Rates(self.settings.limits.requests_per_minute)
        chat = self.settings.chat
        self.generator = Generator(self.opened or self._open, batch=chat.batch, loaded=chat.loaded, most=chat.queue)
        self.templates = templates()
        self.policies: Mapping[str, tuple[Path, str | None]] = {}
        self._prepare()

    def _prepare(self) -> None:
        self.database.now(people.publish_instructions, self.settings, self.clock())
        self.database.now(conversations.stop_unfinished)
        rounds.finish_all(self.database, self.folder)
        if self.settings.gold is not None:
            sources.add_file(self.database, Path(self.settings.gold), "gold", self.settings, self.clock())
        self._check_gold()
        self.scan()

    def _check_gold(self) -> None:
        """
        Raises:
          ConfigError: a group's screening needs more gold items than there are; its new members would get no tasks.
        """
        (count,) = self.database.reader.execute(f"SELECT count(*) FROM tasks WHERE {screening.CURRENT}").fetchone()
        for name, group in self.settings.groups.items():
            if group.screening > count:
                raise ConfigError(f"groups.{name}.screening is {group.screening}, but 'gold' has {count} items. Add some.")

    def scan(self) -> int:
        """Look for new tasks and policies. Returns how many tasks are new. Errors go to ``problem``, which the operator sees."""
        try:
            self.policies = self._offered()
            new = sources.add_waiting(self.database, self.runs, self.settings, self.clock())
            self.problem = ""
        except LockstepError as error:
            new, self.problem = 0, str(error)
        return new

    def _offered(self) -> dict[str, tuple[Path, str | None]]:
        found = sources.policies_in(self.runs)
        wanted = self.settings.chat.policies
        missing = [name for name in wanted if not any(name in (each, stage) for each, (_, stage) in found.items())]
        if missing and found:
            raise ConfigError(f"chat.policies names {listing(missing)}, but the runs have {listing(found)}.")
        return {each: (run, stage) for each, (run, stage) in found.items() if not wanted or {each, stage} & {*wanted}}

    async def scan_forever(self) -> None:
        while True:
            await anyio.sleep(SECONDS_BETWEEN_SCANS)
            try:
                await anyio.to_thread.run_sync(self.scan)
            except Exception:  # the studio keeps serving, without new tasks
                log.exception("Looking for new tasks failed.")

    def find_personal_data(self) -> None:
        """Search new free text for personal data. Call this off the event loop."""
        if found := privacy.scan(self.database.reader, {self.settings.chat.system}):
            self.database.now(privacy.remember, found, self.clock())

    async def remove(self, person: int) -> dict[str, Any]:
        """Remove all that a person chose and wrote, from the database's files too; see `privacy.remove`."""
        removed = await self.database.do(privacy.remove, person, self.clock())
        await anyio.to_thread.run_sync(self.database.checkpoint)
        return removed

    def draw_policies(self, count: int) -> list[str]:
        """Draw ``count`` policies in random order; different ones if there are enough.

        Raises:
          Refused: there is none.
        """
        names = list(self.policies)
        if not names:
            raise people.Refused("There is no policy to talk to yet. The operator serves runs: lockstep serve RUN...", 503)
        dice = random.SystemRandom()
        return dice.sample(names, count) if len(names) >= count else [dice.choice(names) for _ in range(count)]

    def names(self) -> set[str]:
        """Words that give a policy away, in lower case."""
        stages = {stage for _, stage in self.policies.values() if stage}
        return {name.lower() for name in {*self.policies, *stages, *self.settings.names} if len(name) > 2}

    def _open(self, policy: str) -> Speaker:
        from lockstep.api.policies import load

        if policy not in self.policies:
            raise people.Refused(f"The policy {policy} is not served any more.", 410)
        source, stage = self.policies[policy]
        return PolicySpeaker(load(source, self.backend, stage=stage))

    def close(self) -> None:
        self.generator.close()
        self.database.close()


def templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, auto_reload=False)
    environment.undefined = jinja2.StrictUndefined
    environment.filters["visible"] = visible
    environment.filters["day"] = lambda at: time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
    return environment
