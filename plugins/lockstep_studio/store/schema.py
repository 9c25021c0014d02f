"""The tables. Labels, messages and feedback are append-only, which triggers enforce. If a person has them removed, the rows stay
without their content, so that counts and references stay valid.

`SCHEMA` is the first version; `UPGRADES` lead from each version to the next. A new database goes through the same steps as an old
one, so both have the same tables.
"""

KEEP = """
CREATE TRIGGER {table}_stay BEFORE DELETE ON {table} BEGIN SELECT RAISE(ABORT, '{table} are never deleted'); END;
CREATE TRIGGER {table}_same BEFORE UPDATE ON {table} WHEN NOT ({removed})
  BEGIN SELECT RAISE(ABORT, '{table} never change'); END;
"""

SCHEMA = """
CREATE TABLE instructions (
  grp TEXT NOT NULL, version TEXT NOT NULL, text TEXT NOT NULL, consent TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (grp, version)) WITHOUT ROWID;

CREATE TABLE people (
  id INTEGER PRIMARY KEY, pseudonym TEXT NOT NULL UNIQUE, role TEXT NOT NULL CHECK (role IN ('labeler', 'operator')),
  grp TEXT NOT NULL, name TEXT UNIQUE, password TEXT,
  standing TEXT NOT NULL DEFAULT 'active' CHECK (standing IN ('active', 'screened out', 'paused', 'removed')), at REAL NOT NULL);
CREATE TABLE invitations (
  token BLOB PRIMARY KEY, role TEXT NOT NULL, grp TEXT NOT NULL, uses INTEGER NOT NULL, expires REAL NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE sessions (
  id BLOB PRIMARY KEY, person INTEGER NOT NULL REFERENCES people, at REAL NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX sessions_of ON sessions (person);
CREATE TABLE consents (
  person INTEGER NOT NULL REFERENCES people, grp TEXT NOT NULL, version TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (person, grp, version)) WITHOUT ROWID;
CREATE TABLE failures (id INTEGER PRIMARY KEY, who TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX failures_of ON failures (who, at);

CREATE TABLE sources (
  id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, kind TEXT NOT NULL CHECK (kind IN ('candidates', 'gold')),
  sha256 TEXT NOT NULL, rows INTEGER NOT NULL, complete INTEGER NOT NULL DEFAULT 0, at REAL NOT NULL, round INTEGER);
CREATE TABLE tasks (
  id INTEGER PRIMARY KEY, source INTEGER REFERENCES sources, key TEXT NOT NULL, mode TEXT NOT NULL, messages TEXT NOT NULL,
  completions TEXT NOT NULL, policies TEXT, scores TEXT, seed INTEGER, gold TEXT,
  author INTEGER REFERENCES people, at REAL NOT NULL, UNIQUE (source, key));
CREATE INDEX tasks_by ON tasks (author) WHERE author IS NOT NULL;
CREATE INDEX gold_tasks ON tasks (mode) WHERE gold IS NOT NULL;
CREATE TABLE slots (
  task INTEGER NOT NULL REFERENCES tasks, grp TEXT NOT NULL, mode TEXT NOT NULL, wanted INTEGER NOT NULL,
  taken INTEGER NOT NULL DEFAULT 0, weight REAL NOT NULL DEFAULT 1, open INTEGER NOT NULL DEFAULT 1,
  PRIMARY KEY (task, grp, mode)) WITHOUT ROWID;
CREATE INDEX free_slots ON slots (grp, mode, task) WHERE open AND taken < wanted;
CREATE TABLE pools (
  grp TEXT NOT NULL, mode TEXT NOT NULL, tasks INTEGER NOT NULL, weight REAL NOT NULL, labels INTEGER NOT NULL,
  PRIMARY KEY (grp, mode)) WITHOUT ROWID;
CREATE TRIGGER slots_added AFTER INSERT ON slots WHEN NEW.open AND NEW.taken < NEW.wanted BEGIN
  INSERT INTO pools VALUES (NEW.grp, NEW.mode, 1, NEW.weight, NEW.wanted - NEW.taken) ON CONFLICT DO UPDATE SET
  tasks = tasks + 1, weight = weight + excluded.weight, labels = labels + excluded.labels; END;
CREATE TRIGGER slots_changed AFTER UPDATE ON slots BEGIN
  UPDATE pools SET
  tasks = tasks + (NEW.open AND NEW.taken < NEW.wanted) - (OLD.open AND OLD.taken < OLD.wanted),
  weight = weight + NEW.weight * (NEW.open AND NEW.taken < NEW.wanted) - OLD.weight * (OLD.open AND OLD.taken < OLD.wanted),
  labels = labels + NEW.open * max(0, NEW.wanted - NEW.taken) - OLD.open * max(0, OLD.wanted - OLD.taken)
  WHERE grp = NEW.grp AND mode = NEW.mode; END;

CREATE TABLE leases (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, task INTEGER NOT NULL REFERENCES tasks,
  person INTEGER NOT NULL REFERENCES people, grp TEXT NOT NULL, mode TEXT NOT NULL, shown TEXT NOT NULL, probability REAL,
  slot INTEGER NOT NULL, draft TEXT NOT NULL DEFAULT '{}', at REAL NOT NULL, expires REAL NOT NULL,
  outcome TEXT CHECK (outcome IN ('labelled', 'skipped', 'expired', 'closed')), ended REAL);
CREATE UNIQUE INDEX one_at_a_time ON leases (person, mode) WHERE outcome IS NULL;
CREATE INDEX leases_of ON leases (person, task, mode);
CREATE INDEX seen ON leases (person, mode, task) WHERE outcome IN ('labelled', 'skipped');
CREATE INDEX labelled ON leases (person, mode) WHERE outcome = 'labelled';
CREATE INDEX expiring ON leases (expires) WHERE outcome IS NULL;

CREATE TABLE labels (
  id INTEGER PRIMARY KEY, lease INTEGER NOT NULL REFERENCES leases, task INTEGER NOT NULL REFERENCES tasks,
  person INTEGER NOT NULL REFERENCES people, grp TEXT NOT NULL, mode TEXT NOT NULL, revision INTEGER NOT NULL, content TEXT,
  instructions TEXT NOT NULL, seconds REAL NOT NULL, correct REAL, at REAL NOT NULL, UNIQUE (lease, revision));
CREATE INDEX labels_on ON labels (task, person);
CREATE INDEX labels_of ON labels (person, revision, mode);
CREATE INDEX labels_at ON labels (at);

CREATE TABLE conversations (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, person INTEGER NOT NULL REFERENCES people, grp TEXT NOT NULL,
  mode TEXT NOT NULL CHECK (mode IN ('chat', 'arena', 'attack')), policies TEXT NOT NULL, how TEXT NOT NULL, head INTEGER,
  title TEXT NOT NULL DEFAULT '', goal TEXT, category TEXT, success INTEGER, instructions TEXT NOT NULL, at REAL NOT NULL,
  finished REAL);
CREATE INDEX conversations_of ON conversations (person, mode, id);
CREATE TABLE messages (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, conversation INTEGER NOT NULL REFERENCES conversations, parent INTEGER,
  role TEXT NOT NULL, content TEXT, policy TEXT, seed INTEGER, side INTEGER, state TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX messages_in ON messages (conversation, parent);
CREATE INDEX unfinished ON messages (state) WHERE state = 'writing';
CREATE INDEX messages_at ON messages (at);
CREATE TABLE feedback (
  id INTEGER PRIMARY KEY, message INTEGER NOT NULL REFERENCES messages, person INTEGER NOT NULL REFERENCES people,
  revision INTEGER NOT NULL, thumb INTEGER, likert INTEGER, text TEXT, at REAL NOT NULL, UNIQUE (message, revision));

CREATE TABLE findings (
  kind TEXT NOT NULL, id INTEGER NOT NULL, found TEXT NOT NULL, at REAL NOT NULL,
  decision TEXT CHECK (decision IN ('release', 'withhold')), decided REAL, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE TABLE tombstones (
  id INTEGER PRIMARY KEY, person INTEGER NOT NULL REFERENCES people, at REAL NOT NULL, labels INTEGER NOT NULL,
  messages INTEGER NOT NULL);
CREATE TABLE rounds (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL CHECK (state IN ('closing', 'closed')), at REAL NOT NULL,
  last_label INTEGER NOT NULL, last_message INTEGER NOT NULL, record TEXT);
CREATE TABLE members (
  kind TEXT NOT NULL, id INTEGER NOT NULL, round INTEGER NOT NULL REFERENCES rounds, PRIMARY KEY (kind, id)) WITHOUT ROWID;
CREATE INDEX members_of ON members (round, kind, id);
""" + "".join(
    KEEP.format(table=table, removed=removed)
    for table, removed in {
        "labels": "NEW.content IS NULL AND NEW.id = OLD.id AND NEW.lease = OLD.lease AND NEW.at = OLD.at",
        "feedback": "NEW.text IS NULL AND NEW.id = OLD.id AND NEW.message = OLD.message AND NEW.at = OLD.at",
        "messages": "(OLD.state = 'writing' OR NEW.content IS NULL) AND NEW.id = OLD.id AND NEW.conversation = OLD.conversation"
        " AND NEW.parent IS OLD.parent AND NEW.at = OLD.at",
        "tombstones": "0",
    }.items()
)

UPGRADES = (
    # 1 to 2. tasks.asked: the message whose answers are compared; tasks.against: the demonstration that is compared. A
    # mistyped name may be a password, so the stored failures are deleted.
    """
ALTER TABLE tasks ADD COLUMN asked INTEGER REFERENCES messages;
ALTER TABLE tasks ADD COLUMN against INTEGER REFERENCES labels;
UPDATE tasks SET against = CAST(substr(key, length('against-') + 1) AS INTEGER)
  WHERE source IS NULL AND key LIKE 'against-%' AND policies LIKE '["person", %';
UPDATE tasks SET asked = (SELECT max(messages.id) FROM messages JOIN conversations ON conversations.id = conversation
  WHERE conversations.token = substr(tasks.key, 1, 22) AND role = 'user')
  WHERE source IS NULL AND author IS NOT NULL AND against IS NULL AND mode IN ('compare', 'attack');
CREATE INDEX compared ON tasks (against) WHERE against IS NOT NULL;
ALTER TABLE rounds ADD COLUMN last_feedback INTEGER NOT NULL DEFAULT 0;
UPDATE rounds SET last_feedback = (SELECT ifnull(max(id), 0) FROM feedback);
CREATE TABLE written (
  person INTEGER NOT NULL REFERENCES people, day INTEGER NOT NULL, characters INTEGER NOT NULL, PRIMARY KEY (person, day)
) WITHOUT ROWID;
DELETE FROM failures;
""",
)
VERSION = 1 + len(UPGRADES)
