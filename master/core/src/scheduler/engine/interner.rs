//! Small numbers for services, counted by who uses them.

use std::collections::BTreeMap;

use skein_api::ServiceId;

/// Services of profiles and classes by number; 0 stands for none.
#[derive(Clone, Debug, Default)]
pub(super) struct Services {
    numbers: BTreeMap<ServiceId, u32>,
    /// By number - 1.
    users: Vec<(Option<ServiceId>, u32)>,
    free: Vec<u32>,
}

impl Services {
    /// The number of a service, counted once more.
    pub(super) fn intern(&mut self, service: Option<&ServiceId>) -> u32 {
        let Some(service) = service else { return 0 };
        if let Some(number) = self.numbers.get(service) {
            self.users[*number as usize - 1].1 += 1;
            return *number;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.users.push((None, 0));
            u32::try_from(self.users.len()).expect("fewer services than 2^32")
        });
        self.users[number as usize - 1] = (Some(service.clone()), 1);
        self.numbers.insert(service.clone(), number);
        number
    }

    /// Counts a user less.
    pub(super) fn release(&mut self, number: u32) {
        let Some(at) = (number as usize).checked_sub(1) else { return };
        let (service, users) = &mut self.users[at];
        *users -= 1;
        if *users == 0 {
            let service = service.take().expect("a number in use has its service");
            self.numbers.remove(&service);
            self.free.push(number);
        }
    }
}
