"""The database of a studio: one SQLite file, one writer.

database.py       connections, the writer's thread, backup
schema.py         the tables
people.py         groups, invitations, people, sessions, consent
tasks.py          tasks and their leases
screening.py      gold items, and who passes them
labels.py         labels and their revisions, disagreements
against.py        comparisons of demonstrations with answers
conversations.py  trees of messages, feedback
privacy.py        personal data in free text, removal on request
rounds.py         closing a round: frozen files
report.py         what the operator sees, and the audit export

Functions take a connection first. Functions that change something run on the writer's thread: ``await database.do(function,
...)``. Times are seconds since 1970, passed in by the caller.
"""
