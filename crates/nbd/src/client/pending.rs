//! A request between its sending and its last chunk.

use highwater_model::ByteRange;

use super::assembly::Assembly;
use super::{Completion, ContextExtents, Extent};
use crate::error::{ProtocolError, RequestError};
use crate::export::MetaContext;

/// A request in flight.
pub(super) struct Pending {
    /// The cookie on the wire: unique on this connection, unlike the caller's.
    pub(super) handle: u64,
    pub(super) cookie: u64,
    pub(super) range: ByteRange,
    pub(super) work: Work,
    /// The first error the server reported; once set, the request has failed
    /// whatever else arrives.
    pub(super) error: Option<RequestError>,
}

/// What a request waits for.
pub(super) enum Work {
    Read {
        buffer: Vec<u8>,
        assembly: Assembly,
    },
    Status(Status),
    Write {
        buffer: Vec<u8>,
    },
    /// No payload in either direction.
    Effect,
}

/// A failed block status request that its server may not be done with.
pub(super) struct Straggler {
    pub(super) handle: u64,
    /// How many chunks may still come: one for each context.
    pub(super) left: usize,
}

/// Block status as it comes in, each context by itself.
pub(super) struct Status {
    asked: Vec<u32>,
    kept: Vec<u32>,
    answered: Vec<(u32, Vec<Extent>)>,
}

impl Status {
    /// Expects an answer from each of `asked`; the extents of `kept` are wanted.
    pub(super) const fn asking(asked: Vec<u32>, kept: Vec<u32>) -> Self {
        Self {
            asked,
            kept,
            answered: Vec::new(),
        }
    }

    /// Begins the chunk of a context; each may answer once. Returns whether
    /// its extents are wanted.
    pub(super) fn begin(&mut self, context: u32) -> Result<bool, ProtocolError> {
        if !self.asked.contains(&context) {
            return Err(ProtocolError::UnknownContext(context));
        }
        if self
            .answered
            .iter()
            .any(|(answered, _)| *answered == context)
        {
            return Err(ProtocolError::ContextTwice(context));
        }
        self.answered.push((context, Vec::new()));
        Ok(self.kept.contains(&context))
    }

    /// Adds an extent to the context begun last.
    pub(super) fn push(&mut self, extent: Extent) {
        if let Some((_, extents)) = self.answered.last_mut() {
            extents.push(extent);
        }
    }

    /// Returns how many contexts were asked.
    pub(super) const fn asked(&self) -> usize {
        self.asked.len()
    }

    /// Returns how many extents are held.
    pub(super) fn len(&self) -> usize {
        self.answered.iter().map(|(_, extents)| extents.len()).sum()
    }

    fn finish(self, contexts: &[MetaContext]) -> Result<Vec<ContextExtents>, ProtocolError> {
        let missing = |id: &&u32| !self.answered.iter().any(|(answered, _)| answered == *id);
        if let Some(id) = self.asked.iter().find(missing) {
            return Err(ProtocolError::ContextMissing(*id));
        }
        let mut named = Vec::with_capacity(self.answered.len());
        let kept = |(id, _): &(u32, Vec<Extent>)| self.kept.contains(id);
        for (id, extents) in self.answered.into_iter().filter(kept) {
            let context = contexts.iter().find(|context| context.id == id);
            let context = context
                .ok_or(ProtocolError::UnknownContext(id))?
                .name
                .clone();
            named.push(ContextExtents { context, extents });
        }
        Ok(named)
    }
}

impl Pending {
    /// Notes an error; the first one tells most about the cause.
    pub(super) fn fail(&mut self, error: RequestError) {
        self.error.get_or_insert(error);
    }

    /// Draws the balance after the last chunk.
    ///
    /// A reply that reported an error need not be complete; one that reported
    /// none must be.
    pub(super) fn finish(self, contexts: &[MetaContext]) -> Result<Completion, ProtocolError> {
        let Self {
            cookie,
            range,
            work,
            error,
            ..
        } = self;
        let mut done = Completion {
            cookie,
            range,
            result: Ok(Vec::new()),
            extents: vec![],
            spare: vec![],
        };
        if let Some(error) = error {
            done.result = Err(error);
            if let Work::Read { mut buffer, .. } | Work::Write { mut buffer } = work {
                buffer.clear();
                done.spare = buffer;
            }
            return Ok(done);
        }
        match work {
            Work::Read { buffer, assembly } => {
                assembly.check_whole()?;
                done.result = Ok(buffer);
            }
            Work::Write { buffer } => done.result = Ok(buffer),
            Work::Status(status) => done.extents = status.finish(contexts)?,
            Work::Effect => {}
        }
        Ok(done)
    }
}
