"""``methods_in_same_group`` and ``active_methods``: which methods of a record belong or run together."""

from __future__ import annotations

from .injection_record import InjectionRecord
from .method import Method


def methods_in_same_group(record: InjectionRecord, method: Method) -> list[Method]:
    """Return the methods in the group of this one; of a method without a group, all others without a group."""
    group_of = {member: group for group, names in record.method_groups.items() for member in names}
    return [member for member in record.methods if group_of.get(member.name) == group_of.get(method.name)]


def active_methods(record: InjectionRecord) -> list[Method]:
    """Return the methods whose adapters are active."""
    return [method for name in record.active for method in record._members(name)]
