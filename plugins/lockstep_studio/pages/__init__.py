"""The pages, a file per mode.

visit.py        one request: the visitor, the fields sent, the response
entry.py        invitations, signing in, instructions and consent, home, own work
tasks.py        code that prepared tasks share: lease, label, skip, undo
compare.py rank.py write.py adjudicate.py    how each mode shows and reads a task
talk.py         code that conversations share: streamed answers, feedback
chat.py arena.py attack.py
operator.py     the operator's page

Every page also answers ``Accept: application/json`` with the data that its template would get.
"""
