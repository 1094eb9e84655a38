//! Cuts peers that do not read: what waits for them would wait for ever, with the memory that it takes.
//!
//! Only writing is watched. A peer that is quiet, because there is nothing to say to it, may be so for as long as it
//! likes; whether it still lives is for pings to find out.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// A stream whose writes fail once the peer has taken nothing for `within`.
pub struct Unstalled<S> {
    stream: S,
    within: Duration,
    /// Rings when a write has waited for too long; there while one waits.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<S> Unstalled<S> {
    /// Around `stream`.
    pub fn new(stream: S, within: Duration) -> Self {
        Self { stream, within, alarm: None }
    }

    /// Lets an outcome through; one that waits gets the alarm, or its end.
    fn watched<T>(&mut self, outcome: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.alarm = None;
            return outcome;
        }
        let until = Instant::now() + self.within;
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        alarm.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watched(outcome, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.watched(outcome, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.watched(outcome, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watched(outcome, cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const WITHIN: Duration = Duration::from_secs(20);

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_cut_after_the_limit_and_not_before() {
        let (here, _there) = duplex(16);
        let mut here = Unstalled::new(here, WITHIN);
        let began = Instant::now();
        let error = here.write_all(&[0; 17]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed(), WITHIN);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_and_a_quiet_one_stay() {
        let (here, mut there) = duplex(16);
        let mut here = Unstalled::new(here, WITHIN);
        let reader = tokio::spawn(async move {
            for _ in 0..4 {
                tokio::time::sleep(WITHIN * 9 / 10).await;
                there.read_exact(&mut [0; 16]).await.unwrap();
            }
            there
        });
        here.write_all(&[0; 64]).await.unwrap();
        let _there = reader.await.unwrap();
        tokio::time::sleep(WITHIN * 10).await;
        here.write_all(&[0; 16]).await.unwrap();
    }
}
