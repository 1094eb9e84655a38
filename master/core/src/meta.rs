//! Common fields of objects: filled in one place.

use skein_api::{Meta, Origin};

use crate::command::{Context, Now};

/// Fields of a new object.
pub(crate) fn created(ctx: &Context) -> Meta {
    Meta {
        generation: 1,
        revision: 0,
        created_at: ctx.now.wall,
        updated_at: ctx.now.wall,
        changed_by: ctx.origin.clone(),
    }
}

/// Fields of a changed object; `spec` says whether its specification changed.
pub(crate) fn changed(meta: &Meta, ctx: &Context, spec: bool) -> Meta {
    Meta {
        generation: meta.generation + u64::from(spec),
        updated_at: ctx.now.wall,
        changed_by: ctx.origin.clone(),
        ..meta.clone()
    }
}

/// The context of a change that the master itself decides.
pub(crate) fn internal(who: &str, why: &str, now: Now, seed: u64) -> Context {
    Context { now, origin: Origin { who: who.to_owned(), why: why.to_owned() }, seed }
}
