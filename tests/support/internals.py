"""The one way from a test into a session, where nothing public tells what it must know."""

from __future__ import annotations

from dataclasses import replace

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.control.monitor import Monitor
from bapq_edge.engine.graph import Graphs
from bapq_edge.engine.store import Store
from bapq_edge.planning.plan_set import PlanSet
from bapq_edge.planning.planner import ChunkCosts, Plan


def bank_of(session: Session) -> Bank:
    """The bank that it runs."""
    return session.internals.bank


def store_of(session: Session) -> Store:
    """The native store."""
    return session.internals.store


def graphs_of(session: Session) -> Graphs:
    """The graphs in ONNX Runtime."""
    return session.internals.graphs


def monitor_of(session: Session) -> Monitor | None:
    """What reads the sensors and decides."""
    return session.internals.monitor


def costs_of(session: Session) -> ChunkCosts:
    """What its planner plans with."""
    return session.internals.replanner.costs


def plans_of(session: Session) -> PlanSet:
    """The plans of the runs that begin now."""
    return session.internals.replanner.plans


def plan_of(session: Session) -> Plan:
    """The plan of most runs that begin now."""
    return plans_of(session).main_plan


def smallest_limit_of(session: Session) -> int:
    """Smallest number of weight bytes that it can do with."""
    return session.internals.replanner.smallest_limit()


def adopt(session: Session, plan: Plan) -> None:
    """Run this plan from the next run on, whatever the session was asked for."""
    replanner = session.internals.replanner
    with replanner.lock:
        replanner.adopt(replace(replanner.plans, by_precision={None: plan}))
