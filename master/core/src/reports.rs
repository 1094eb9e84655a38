//! What agents say of their tasks.

use skein_api::{NodeId, Task, TaskReport, TaskState};

use crate::{
    command::{Context, Decision, Reply},
    core::Core,
    lookup::not_found,
    meta,
    model::{Change, Key, Kind, Object},
};

impl Core {
    pub(crate) fn reports(&self, node: &NodeId, reports: &[TaskReport], ctx: &Context) -> Decision {
        if !self.model.nodes.contains_key(node) {
            return Err(not_found("node", node.as_str(), "node ls"));
        }
        let changes = reports.iter().filter_map(|report| self.report(node, report, ctx)).collect();
        Ok((changes, Reply::Done))
    }

    /// One report. A task of another node, an earlier run or a state that was already passed changes nothing: reports
    /// are sent again until they are durable, so late and double ones are normal.
    fn report(&self, node: &NodeId, report: &TaskReport, ctx: &Context) -> Option<Change> {
        let task = self.model.tasks.get(&report.task).filter(|t| t.node.as_ref() == Some(node))?;
        // Agents restart container tasks by themselves and count the runs; an earlier run is over and says nothing.
        if report.run < task.run && task.service.is_none() {
            return None;
        }
        let new_run = report.run > task.run && task.service.is_none();
        let (known, said) = (&task.status, &report.status);
        if task.status.state == TaskState::Orphaned {
            // The host was lost and is back. Its copy was replaced; once it has stopped there is nothing to remember.
            let gone = said.state.is_terminal();
            return gone.then(|| Change::Delete(Key { kind: Kind::Task, id: task.id.to_string() }));
        }
        if said.state == TaskState::Remove && task.desired_state == TaskState::Remove {
            return Some(Change::Delete(Key { kind: Kind::Task, id: task.id.to_string() }));
        }
        // States only go forward within a run.
        if !new_run && (said.state < known.state || said == known) {
            return None;
        }
        let meta = meta::changed(&task.meta, ctx, false);
        let run = task.run.max(report.run);
        Some(Change::Upsert(Object::Task(Box::new(Task { status: said.clone(), run, meta, ..task.clone() }))))
    }
}
