"""The studio: a web app in which people chat with policies, compare, rank, attack, write and adjudicate.

serve.py       the command: lockstep serve RUN...
labels.py      the command: lockstep labels export|import
data.py        closed rounds as a source of data
science/       agreement, strengths, screening
exchange/      the formats of other tools; personal data
settings.py    the settings in studio.yaml
app.py         the ASGI application: all routes behind the guard
protocol.py    limits on connections and headers
sources.py     runs as sources of tasks and policies
generator.py   the thread that owns the models
security.py    sessions, CSRF, headers, limits
store/         the database: people, tasks and leases, labels, conversations, rounds
pages/         the pages, a file per mode
templates/ static/

Labels are rows of one SQLite file until the operator closes a round, which freezes them as files that a stage can train on.
"""

from lockstep.registry import Plugin

plugin = Plugin(
    components={"data": {"human": "lockstep_studio.data:Human"}},
    commands={"serve": "lockstep_studio.serve", "labels": "lockstep_studio.labels"},
)
