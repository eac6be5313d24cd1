"""The columns of a click log, for its writers and readers.

A row is an impression: one item shown to one user at one time. Besides the columns below it has one column of ids for
each field of the model's schema.
"""

from kvcast.protocol.errors import ConfigError
from kvcast.protocol.schema import FeatureSchema, Field

USER = "user"  # text or an integer
TIME = "time"  # whole seconds, from any zero on
LABEL = "label"  # 1: the event that the model predicts happened; 0: it did not
REQUEST = "request"  # optional, text or an integer: a user's rows with the same value were shown together
TRUTH = "truth"  # only in generated logs: the probability of the label
REQUIRED = (USER, TIME, LABEL)
OPTIONAL = (REQUEST,)


def event_fields(schema: FeatureSchema) -> tuple[Field, ...]:
    """Return the fields that only an event has, such as `action`."""
    shown = {field.name for field in schema.candidate_fields}
    return tuple(field for field in schema.history_fields if field.name not in shown)


def marking_fields(schema: FeatureSchema, time_field: str) -> tuple[Field, ...]:
    """Return the fields that tell events from mere impressions: a row in which one of them is not 0 becomes history.

    Every row has a time, so the field that holds it says nothing. Where no field is left, rows with label 1 become
    history.
    """
    return tuple(field for field in event_fields(schema) if field.name != time_field)


def log_fields(schema: FeatureSchema) -> tuple[Field, ...]:
    """Return the fields that a log has a column for: those of a candidate, then those that only an event has.

    Raises:
        ConfigError: a field has the name of another column of the log.
    """
    fields = schema.candidate_fields + event_fields(schema)
    taken = sorted({USER, TIME, LABEL, REQUEST, TRUTH} & {field.name for field in fields})
    if taken:
        raise ConfigError(f"fields: a log's own columns are called {', '.join(taken)}: give these fields other names")
    return fields
