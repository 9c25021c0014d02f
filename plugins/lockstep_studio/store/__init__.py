"""The database of a studio: one SQLite file, one writer.

database.py       connections, the writer's thread, backup
schema.py         the tables
people.py         groups, invitations, people, sessions, consent
tasks.py          tasks, and who holds which
screening.py      gold items: who may go on
labels.py         labels and their revisions, disagreement
against.py        comparisons of demonstrations with answers
conversations.py  trees of messages, feedback
privacy.py        personal data in free text, removal on request
rounds.py         closing a round: frozen files
report.py         what the operator sees, and the audit export

Functions take a connection first. Those that change something run on the writer's thread: ``await database.do(function, ...)``.
Times are seconds since 1970, and are passed in.
"""
