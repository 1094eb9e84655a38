//! One host under `agent_core::reconcile`: scenarios told by hand and random histories, over a small model of an engine.

mod histories;
mod model;
mod scenarios;
