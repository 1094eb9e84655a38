//! Tests of the real kernel path: hosts are network namespaces on one bridge, containers are namespaces wired as the
//! engine does it, and what netlib did is read back with `ip -j`, `bridge -j` and `nft -j`.
//!
//! They need root. `SKEIN_TEST_FAST=1` leaves them out; a filter on this binary's name (`kernel`) does too.

mod connectivity;
mod fast;
mod guards;
mod ingress;
mod isolation;
mod lab;
mod ports;
mod repair;
mod services;
mod underlay;
